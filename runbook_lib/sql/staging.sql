-- Phase 40: texts out, vectors into the staging table.

-- name: key_type
-- purpose: The key's type, for binary COPY.
SELECT format_type(atttypid, NULL) AS type FROM pg_attribute
WHERE attrelid = to_regclass(%(table)s) AND attname = %(key)s AND NOT attisdropped;

-- name: to_stage
-- purpose: The next rows in key order that have text, but neither the vector of that text nor a staged one.
SELECT t.{key} AS key, {text} AS text, {text_hash} AS text_hash
FROM {table} t
WHERE {after} AND btrim({text}, E' \t\r\n') <> ''
  AND t.{embedding_hash} IS DISTINCT FROM {text_hash}
  AND NOT EXISTS (SELECT FROM {staging} s WHERE s.key = t.{key} AND s.text_hash = {text_hash})
  AND NOT EXISTS (SELECT FROM {rejected} r WHERE r.key = t.{key})
ORDER BY t.{key} LIMIT %(batch_rows)s;

-- name: hashes_of
-- purpose: Hash of the text of these rows as it is now; rows that are gone are left out.
SELECT t.{key} AS key, {text_hash} AS text_hash FROM {table} t
WHERE t.{key} = ANY (%(keys)s) AND btrim({text}, E' \t\r\n') <> '';

-- name: forget
-- purpose: Take out staged vectors of older texts before the new ones arrive.
-- lock: ROW EXCLUSIVE on the staging table
-- undo: load again
DELETE FROM {staging} WHERE key = ANY (%(keys)s);

-- name: copy
-- purpose: COPY the vectors into the staging table, in binary, a transaction a batch.
-- lock: ROW EXCLUSIVE on the staging table; none on the target
-- undo: schema.drop_staging
COPY {staging} (key, text_hash, embedding) FROM STDIN (FORMAT BINARY);

-- name: reject
-- purpose: Keep each refused vector's key and reason.
-- lock: ROW EXCLUSIVE on the table of refused vectors
-- undo: schema.drop_staging
INSERT INTO {rejected} (key, reason) VALUES (%(key)s, %(reason)s)
ON CONFLICT (key) DO UPDATE SET reason = excluded.reason, rejected_at = now();

-- name: forgive
-- purpose: Forget earlier refusals, so that this load tries those rows again.
-- lock: ROW EXCLUSIVE on the table of refused vectors
-- undo: none needed; a refusal is found again
DELETE FROM {rejected};

-- name: counts
-- purpose: Rows with text, and how many of them still want a vector, by the texts as they are now.
SELECT count(*) AS with_text,
       count(*) FILTER (WHERE current OR staged) AS ready,
       count(*) FILTER (WHERE NOT current AND NOT staged AND queued) AS queued,
       count(*) FILTER (WHERE NOT current AND NOT staged AND NOT queued) AS lost
FROM (
    SELECT t.{embedding_hash} IS NOT DISTINCT FROM {text_hash} AS current,
           s.text_hash IS NOT DISTINCT FROM {text_hash} AS staged,
           EXISTS (SELECT FROM {queue} q WHERE q.key = t.{key}) AS queued
    FROM {table} t LEFT JOIN {staging} s ON s.key = t.{key}
    WHERE btrim({text}, E' \t\r\n') <> ''
) x;

-- name: staged_vectors
-- purpose: Staged rows, and how many have another dimension or no direction.
SELECT count(*) AS staged,
       count(*) FILTER (WHERE vector_dims(embedding) <> %(dimension)s) AS wrong_dimension,
       count(*) FILTER (WHERE (embedding <#> embedding) = 0) AS zero
FROM {staging};

-- name: rejected
-- purpose: Refused vectors by reason.
SELECT reason, count(*) AS rows, min(key::text) AS for_instance FROM {rejected} GROUP BY reason ORDER BY 2 DESC;
