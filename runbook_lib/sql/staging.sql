-- Phase 40: texts out, vectors into the staging table.

-- name: session
-- purpose: Look rows up one by one, and compile no plan: the staging table grows while its statistics do not.
SELECT set_config('enable_seqscan', 'off', false), set_config('enable_hashjoin', 'off', false),
       set_config('enable_mergejoin', 'off', false), set_config('jit', 'off', false);

-- name: to_stage
-- purpose: The next rows in key order that have text, but neither the vector of that text nor a staged one.
SELECT {one t.key AS key}, {text} AS text, t.{first_text_column}::text AS title, {text_hash} AS text_hash,
       EXISTS (SELECT FROM {staging} s WHERE {s.own_key = t.key}) AS staged_before
FROM {with_vectors}
WHERE {after} AND {has_text}
  AND {row_embedding_hash} IS DISTINCT FROM {text_hash}
  AND NOT EXISTS (SELECT FROM {staging} s WHERE {s.own_key = t.key} AND s.text_hash = {text_hash})
  AND NOT EXISTS (SELECT FROM {rejected} r WHERE {r.own_key = t.key})
ORDER BY {t.key} LIMIT %(batch_rows)s;

-- name: forget_seen
-- purpose: Empty the list of keys that this session has read; it tells a duplicate key from a rerun.
-- lock: none on the target; the list is a temporary table
-- undo: none needed; the list ends with the session
DROP TABLE IF EXISTS pg_temp.runbook_seen;
CREATE TEMPORARY TABLE runbook_seen ({own_key typed}, PRIMARY KEY ({own_key}));

-- name: look_up
-- purpose: For keys of a source: already read, in the table, hash of the current text, staged, vector in the table.
-- lock: none on the target; the keys go into the list of keys read
-- undo: none needed
WITH given AS (
    SELECT {own_key}, n FROM {own_key FROM %keys}
), fresh AS (
    INSERT INTO pg_temp.runbook_seen SELECT {own_key} FROM given ON CONFLICT DO NOTHING RETURNING {own_key}
)
-- Sixteen bytes of hash and four of yes or no for each key, in one value: a row each costs more than its look.
SELECT coalesce(string_agg(
    coalesce(r.text_hash, decode(repeat('00', 16), 'hex'))
    || CASE WHEN {row g.own_key} IN (SELECT {own_key} FROM fresh) THEN '\x00'::bytea ELSE '\x01' END
    || CASE WHEN r.text_hash IS NOT NULL THEN '\x01'::bytea ELSE '\x00' END
    || CASE WHEN r.done OR s.text_hash = r.text_hash THEN '\x01'::bytea ELSE '\x00' END
    || CASE WHEN {s.own_key IS NOT NULL} THEN '\x01'::bytea ELSE '\x00' END, ''::bytea ORDER BY g.n), '') AS found
FROM given g
LEFT JOIN LATERAL (
    -- OFFSET 0 keeps the subquery apart, so that each text is hashed once.
    SELECT text_hash, NOT has_text OR kept_hash IS NOT DISTINCT FROM text_hash AS done FROM (
        SELECT {has_text} AS has_text, {text_hash} AS text_hash, {row_embedding_hash} AS kept_hash
        FROM {with_vectors} WHERE {t.key = g.own_key} OFFSET 0
    ) x
) r ON true
LEFT JOIN {staging} s ON {s.own_key = g.own_key};

-- name: forget
-- purpose: Remove staged vectors of older texts before the new ones arrive.
-- lock: ROW EXCLUSIVE on the staging table
-- undo: load again
DELETE FROM {staging} WHERE {own_key IN %keys};

-- name: copy
-- purpose: COPY the vectors into the staging table, in binary, one transaction per batch.
-- lock: ROW EXCLUSIVE on the staging table; none on the target
-- undo: schema.drop_staging
COPY {staging} ({own_key}, text_hash, embedding) FROM STDIN (FORMAT BINARY);

-- name: reject
-- purpose: Record each rejected row's key, reason and detail.
-- lock: ROW EXCLUSIVE on the table of refused vectors
-- undo: schema.drop_staging
INSERT INTO {rejected} ({own_key}, key_text, reason, detail) VALUES ({values of %key}, %(key_text)s, %(reason)s, %(detail)s);

-- name: forgive
-- purpose: Forget earlier rejections, so that this load tries those rows again.
-- lock: ROW EXCLUSIVE on the table of refused vectors
-- undo: none needed; a refusal is found again
DELETE FROM {rejected};

-- name: counts
-- purpose: Rows with text, and how many of them still need a vector, by their current texts.
SELECT count(*) AS with_text,
       count(*) FILTER (WHERE current OR staged) AS ready,
       count(*) FILTER (WHERE NOT current AND staged IS NOT TRUE AND queued) AS queued,
       count(*) FILTER (WHERE NOT current AND staged IS NOT TRUE AND NOT queued) AS lost
FROM (
    SELECT h.kept_hash IS NOT DISTINCT FROM h.text_hash AS current, h.staged_hash = h.text_hash AS staged, h.queued
    FROM (
        -- OFFSET 0 keeps the subquery apart, so that each text is hashed once.
        SELECT {text_hash} AS text_hash, {row_embedding_hash} AS kept_hash, s.text_hash AS staged_hash,
               EXISTS (SELECT FROM {queue} q WHERE {q.own_key = t.key}) AS queued
        FROM {with_vectors} LEFT JOIN {staged} s ON {s.own_key = t.key}
        WHERE {has_text} AND {is_counted} OFFSET 0
    ) h
) x;

-- name: staged_vectors
-- purpose: Staged rows, and how many have another dimension or no direction.
SELECT count(*) AS staged,
       count(*) FILTER (WHERE {vector_dims}(embedding) <> %(dimension)s) AS wrong_dimension,
       count(*) FILTER (WHERE (embedding {inner_product} embedding) = 0) AS zero
FROM {staging};

-- name: rejected
-- purpose: Rejected vectors by reason, with one row of each.
SELECT reason, count(*) AS rows, (array_agg(key_text ORDER BY id))[1] AS key_text,
       (array_agg(detail ORDER BY id))[1] AS detail
FROM {rejected} GROUP BY reason ORDER BY 2 DESC, 1;
