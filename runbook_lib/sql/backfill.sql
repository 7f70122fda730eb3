-- Phase 50: from the staging table into the column.

-- name: update
-- purpose: Give each row of a batch its vector, if its text is still the text that was embedded.
-- lock: ROW EXCLUSIVE on {table}, on the rows of one batch, until its commit
-- undo: schema.drop_columns
UPDATE {part} t
SET {embedding} = s.embedding, {embedding_hash} = s.text_hash, {embedding_updated_at} = now()
FROM {staging} s
WHERE {s.own_key IN %keys} AND {s.own_key = t.key}
  AND t.{embedding_hash} IS DISTINCT FROM s.text_hash
  AND s.text_hash = {text_hash};

-- name: analyze_staging
-- purpose: Tell the planner how large the staging table has become.
-- lock: SHARE UPDATE EXCLUSIVE on the staging table; none on the target
-- undo: none needed
ANALYZE {staging};

-- name: session
-- purpose: Look rows up one by one; end the session if it freezes in a batch; lose a crash's last commits, and redo them.
SELECT set_config('enable_seqscan', 'off', false), set_config('enable_hashjoin', 'off', false),
       set_config('enable_mergejoin', 'off', false), set_config('jit', 'off', false),
       set_config('synchronous_commit', 'off', false),
       set_config('idle_in_transaction_session_timeout', %(frozen_ms)s, false);

-- name: ranked
-- purpose: The rows of a range of heap blocks that need a vector, by rank within their block, the largest row first.
SELECT rank, array_agg(key ORDER BY block) AS keys FROM (
    SELECT {one t.key AS key}, (t.ctid::text::point)[0] AS block,
           row_number() OVER (PARTITION BY (t.ctid::text::point)[0] ORDER BY {row_bytes} DESC) AS rank
    FROM ONLY {part} t
    WHERE t.ctid >= %(from_tid)s::tid AND t.ctid < %(to_tid)s::tid AND t.{embedding_hash} IS NULL
) r GROUP BY rank ORDER BY rank;

-- name: keys_between
-- purpose: The staged keys of a range.
SELECT array_agg({one s.own_key} ORDER BY {s.own_key}) AS keys FROM {staged} s WHERE {after} AND {s.own_key <= %to_key};

-- name: left_over
-- purpose: Staged rows that are not in the table yet, including those whose text has changed since.
SELECT {one s.own_key AS key} FROM {staged} s JOIN {with_vectors} ON {t.key = s.own_key}
WHERE {row_embedding_hash} IS DISTINCT FROM s.text_hash ORDER BY {s.own_key};

-- name: refusing
-- purpose: Staged rows that are not in the table although their text has not changed.
SELECT {one s.own_key AS key} FROM {staged} s JOIN {with_vectors} ON {t.key = s.own_key}
WHERE {row_embedding_hash} IS DISTINCT FROM s.text_hash AND s.text_hash = {text_hash} ORDER BY {s.own_key} LIMIT %(most)s;

-- name: to_do
-- purpose: How many rows that is.
SELECT count(*) AS rows FROM {staged} s JOIN {with_vectors} ON {t.key = s.own_key}
WHERE {row_embedding_hash} IS DISTINCT FROM s.text_hash;

-- name: hot
-- purpose: Updates of this session that are not reported yet, and how many of them touched no index.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(part)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT coalesce(sum(pg_stat_get_xact_tuples_updated(oid)), 0)::bigint AS updates,
       coalesce(sum(pg_stat_get_xact_tuples_hot_updated(oid)), 0)::bigint AS hot FROM part;

-- name: left
-- purpose: Rows that need a vector, by their current texts; newer: those written since the last drain began.
SELECT count(*) FILTER (WHERE wants AND bare AND NOT newer) AS missing,
       count(*) FILTER (WHERE wants AND NOT bare AND NOT newer) AS stale,
       count(*) FILTER (WHERE newer) AS newer,
       count(*) FILTER (WHERE has_text) AS with_text
FROM (
    SELECT w.*, CASE WHEN NOT wants THEN false ELSE EXISTS (
        SELECT FROM {queue} q WHERE {q.own_key = w.own_key} AND q.attempts = 0 AND q.error IS NULL
            -- Written since, or by a transaction that had not ended then; numbers of transactions wrap at 2^32. A time
            -- in the future is one of before the server's clock went back.
            AND (q.queued_at BETWEEN %(began)s::timestamptz AND clock_timestamp()
                OR (q.xmin::text::bigint - %(oldest)s::bigint + 4294967296) %% 4294967296 < 2147483648)
    ) END AS newer
    FROM (
        SELECT x.*, CASE WHEN bare THEN has_text ELSE old OR NOT has_text END AS wants
        FROM (
            SELECT {t.key AS own_key}, {row_embedding} IS NULL AS bare, {has_text} AS has_text,
                   {row_embedding_hash} IS DISTINCT FROM {text_hash} AS old
            FROM {with_vectors} WHERE {is_counted}
        ) x
    ) w
) counted;

-- name: drain_begins
-- purpose: The server's time, and the oldest transaction that has not ended.
SELECT clock_timestamp()::text AS began,
       pg_snapshot_xmin(pg_current_snapshot())::text::bigint %% 4294967296 AS oldest;

-- name: textless
-- purpose: Rows that have a vector but no longer a text.
SELECT {one t.key AS key} FROM {table} t WHERE t.{embedding} IS NOT NULL AND NOT {has_text};

-- name: clear_textless
-- purpose: Remove the vector of rows whose text is gone.
-- lock: ROW EXCLUSIVE on {table}, on the rows of one batch
-- undo: none needed; there is no text to search
UPDATE {table} t SET {embedding} = NULL, {embedding_hash} = NULL, {embedding_updated_at} = now()
WHERE {t.key IN %keys} AND t.{embedding} IS NOT NULL AND NOT {has_text};

-- name: analyze
-- purpose: Collect statistics; until then the planner assumes the column is NULL and avoids the index.
-- lock: SHARE UPDATE EXCLUSIVE on {vectors}, while a sample of its pages is read
-- undo: none needed
ANALYZE {vectors};

-- name: queued
-- purpose: Changes that wait.
SELECT count(*) AS changes, count(DISTINCT {row own_key}) AS rows FROM {queue};

-- name: server_counts
-- purpose: The position of the WAL, and how large the relation that holds the vectors is.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint AS wal,
       coalesce(sum(pg_table_size(oid)), 0)::bigint AS bytes FROM part;

-- name: staged_rows
-- purpose: Rows in the staging table.
SELECT count(*) AS rows FROM {staged} s;
