-- Rows whose text was inserted or changed since they were embedded.

-- name: worker
-- purpose: Show by a session lock that the worker is alive; its claims are free when the session ends.
-- lock: an advisory lock
-- undo: none needed; it ends with the session
SELECT pg_try_advisory_lock(%(class)s, %(worker)s) AS taken;

-- name: claim
-- purpose: Claim the oldest changes that were queued when the drain began, except those set aside or claimed by a living worker.
-- lock: ROW EXCLUSIVE on the queue, for milliseconds
-- undo: refresh.release
UPDATE {queue} SET claimed_by = %(worker)s, claimed_at = clock_timestamp() WHERE id IN (
    SELECT q.id FROM {queue} q
    -- What was queued, or claimed, in the future was so before the server's clock went back.
    WHERE (q.queued_at <= %(until)s OR q.queued_at > clock_timestamp())
      AND q.attempts < %(tries)s AND q.id <> ALL (%(put_off)s) AND (
        q.claimed_by IS NULL
        OR q.claimed_at NOT BETWEEN clock_timestamp() - make_interval(secs => %(lease_s)s) AND clock_timestamp()
        OR NOT EXISTS (
            -- Of one who could write the queue: anybody else that takes the same lock is no worker.
            SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database()
            JOIN pg_stat_activity a ON a.pid = l.pid JOIN pg_class c ON c.oid = q.tableoid
            WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted AND pg_has_role(a.usesysid, c.relowner, 'MEMBER')
              AND l.classid = %(class)s::bigint::oid AND l.objid = q.claimed_by::oid))
    ORDER BY q.id LIMIT %(batch_rows)s FOR UPDATE SKIP LOCKED
) RETURNING id, {own_key};

-- name: release
-- purpose: Release what this worker claimed and did not finish.
-- lock: ROW EXCLUSIVE on the queue, for milliseconds
-- undo: refresh.claim
UPDATE {queue} SET claimed_by = NULL, claimed_at = NULL WHERE claimed_by = %(worker)s;

-- name: texts
-- purpose: The texts of these rows as they are now, where the vector is not of that text.
SELECT {one t.key AS key}, {text} AS text, t.{first_text_column}::text AS title, {text_hash} AS text_hash,
       {has_text} AS has_text
FROM {with_vectors}
WHERE {t.key IN %keys}
  AND ({row_embedding} IS NULL OR {row_embedding_hash} IS DISTINCT FROM {text_hash});

-- name: lock_rows
-- purpose: Lock these rows, except those that are already locked, and return them.
-- lock: ROW SHARE on {table}, on the rows of one batch, until its commit
-- undo: none needed; the locks end with the transaction
SELECT {one t.key AS key} FROM {table} t WHERE {t.key IN %keys} FOR NO KEY UPDATE SKIP LOCKED;

-- name: lock_rows_beside
-- purpose: Share-lock those of these rows that no writer has locked, and return them.
-- lock: ROW SHARE on {table}, on the rows of one batch, until its commit
-- undo: none needed; the locks end with the transaction
SELECT {one t.key AS key} FROM {table} t WHERE {t.key IN %keys} FOR SHARE SKIP LOCKED;

-- name: update
-- purpose: Give each row its vector, if its text is still the text that was embedded.
-- lock: ROW EXCLUSIVE on {table}, on the rows of one batch, until its commit
-- undo: schema.drop_columns
UPDATE {table} t
SET {embedding} = %(embedding)s, {embedding_hash} = %(text_hash)s, {embedding_updated_at} = now()
WHERE {t.key = %key} AND {text_hash} = %(text_hash)s;

-- name: update_beside
-- purpose: Give each row its vector in the side table, if its text is still the text that was embedded.
-- lock: ROW EXCLUSIVE on {vectors}; a share lock on the rows of one batch of {table}, until its commit
-- undo: sidetable.drop
INSERT INTO {vectors} AS e ({key}, {embedding}, {embedding_hash}, {embedding_updated_at})
SELECT {t.key}, %(embedding)s, %(text_hash)s, now() FROM {table} t
WHERE {t.key = %key} AND {text_hash} = %(text_hash)s FOR SHARE OF t
ON CONFLICT ({key}) DO UPDATE SET {embedding} = excluded.{embedding}, {embedding_hash} = excluded.{embedding_hash},
    {embedding_updated_at} = excluded.{embedding_updated_at};

-- name: update_chunks
-- purpose: Replace the chunks of a row, in one statement, if its text is still the text that was embedded.
-- lock: ROW EXCLUSIVE on {vectors}; a share lock on the rows of one batch of {table}, until its commit
-- undo: sidetable.drop
WITH unchanged AS MATERIALIZED (
    SELECT {t.key AS own_key} FROM {table} t WHERE {t.key = %key} AND {text_hash} = %(text_hash)s FOR SHARE OF t
), cut_off AS (
    DELETE FROM {vectors} e USING unchanged u WHERE {e.key = u.own_key} AND e.{chunk} >= cardinality(%(starts)s::integer[])
), written AS (
    INSERT INTO {vectors} ({key}, {chunk}, {chunk_start}, {chunk_length}, {embedding}, {embedding_hash}, {embedding_updated_at})
    SELECT {u.own_key}, c.place - 1, c.start, c.length, c.embedding, %(text_hash)s, now()
    FROM unchanged u,
         ROWS FROM (unnest(%(starts)s::integer[]), unnest(%(lengths)s::integer[]), unnest(%(embeddings)s::{vector_type}[]))
             WITH ORDINALITY AS c (start, length, embedding, place)
    ON CONFLICT ({key}, {chunk}) DO UPDATE
    SET {embedding} = excluded.{embedding}, {embedding_hash} = excluded.{embedding_hash},
        {embedding_updated_at} = excluded.{embedding_updated_at},
        {chunk_start} = excluded.{chunk_start}, {chunk_length} = excluded.{chunk_length}
)
SELECT {own_key} FROM unchanged;

-- name: clear
-- purpose: Remove the vector of a row whose text is gone.
-- lock: ROW EXCLUSIVE on {table}, on that row
-- undo: none needed; there is no text to search
UPDATE {table} t SET {embedding} = NULL, {embedding_hash} = NULL, {embedding_updated_at} = now()
WHERE {t.key = %key} AND NOT {has_text};

-- name: clear_beside
-- purpose: Remove the vector of a row whose text is gone from the side table.
-- lock: ROW EXCLUSIVE on {vectors}, on that row
-- undo: none needed; there is no text to search
DELETE FROM {vectors} e USING {table} t
WHERE {t.key = %key} AND {e.key = t.key} AND NOT {has_text};

-- name: finish
-- purpose: Remove finished changes from the queue, and earlier failures of the same rows.
-- lock: ROW EXCLUSIVE on the queue
-- undo: none needed; the row has the vector of its text, or is gone
DELETE FROM {queue} WHERE id = ANY (%(ids)s) OR ({own_key IN %keys} AND attempts >= %(tries)s);

-- name: fail
-- purpose: Count a failed try, with its error, and release the change; after the last try it is set aside.
-- lock: ROW EXCLUSIVE on the queue, for milliseconds
-- undo: refresh.one_more_try
UPDATE {queue} SET attempts = attempts + 1, error = %(error)s, claimed_by = NULL, claimed_at = NULL
WHERE id = ANY (%(ids)s) RETURNING attempts;

-- name: put_off
-- purpose: Release changes whose row somebody else has locked, and note who may hold it; this does not count as a try.
-- lock: ROW EXCLUSIVE on the queue, for milliseconds
-- undo: none needed; the changes wait as they did before
UPDATE {queue} SET error = %(error)s, claimed_by = NULL, claimed_at = NULL WHERE id = ANY (%(ids)s);

-- name: one_more_try
-- purpose: Give changes that were set aside one more try.
-- lock: ROW EXCLUSIVE on the queue, for milliseconds
-- undo: none needed; a change that fails again is set aside again
UPDATE {queue} SET attempts = %(tries)s - 1 WHERE attempts >= %(tries)s;

-- name: settle
-- purpose: Remove changes from the queue if their rows are gone or already have their vector.
-- lock: ROW EXCLUSIVE on the queue
-- undo: none needed; nothing is left to do for these rows
DELETE FROM {queue} q WHERE NOT EXISTS (
    SELECT FROM {with_vectors}
    WHERE {t.key = q.own_key} AND CASE WHEN NOT {has_text} THEN {row_embedding} IS NOT NULL
        ELSE {row_embedding_hash} IS DISTINCT FROM {text_hash} END
);

-- name: state
-- purpose: Rows that wait in the queue, by reason.
SELECT count(DISTINCT {row own_key}) FILTER (WHERE attempts < %(tries)s) AS waiting,
       count(DISTINCT {row own_key}) FILTER (WHERE attempts < %(tries)s AND (
           queued_at < coalesce(%(before)s::timestamptz, clock_timestamp()) OR queued_at > clock_timestamp()
       )) AS waiting_since_before,
       count(DISTINCT {row own_key}) FILTER (WHERE attempts >= %(tries)s) AS set_aside,
       coalesce(extract(epoch FROM clock_timestamp() - min(queued_at)), 0)::float8 AS oldest_s,
       min(split_part(error, ':', 1)) FILTER (WHERE attempts >= %(tries)s) AS error,
       count(DISTINCT {row own_key}) FILTER (WHERE attempts < %(tries)s AND error IS NOT NULL) AS tried,
       min(split_part(error, ':', 1)) FILTER (WHERE attempts < %(tries)s) AS tried_error
FROM {queue};

-- name: clock
-- purpose: The server's time.
SELECT clock_timestamp() AS now;

-- name: queue_is_there
-- purpose: Is there a queue to drain?
SELECT to_regclass(%(queue)s) IS NOT NULL AS there;
