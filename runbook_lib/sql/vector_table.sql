-- Vectors that stand in another table of the same database.

-- name: columns
-- purpose: Columns of that table, and whether an index starts with the key.
SELECT a.attname AS name, format_type(a.atttypid, NULL) AS type,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum) AS indexed
FROM pg_attribute a WHERE a.attrelid = to_regclass(%(source)s) AND a.attnum > 0 AND NOT a.attisdropped;

-- name: page
-- purpose: The next rows of that table in key order; rows with equal keys are kept together.
SELECT s.{key} AS key, {value} AS embedding, {hash} AS text_hash FROM {source} s
WHERE s.{key} IS NOT NULL AND {after}
ORDER BY s.{key} FETCH FIRST (%(batch_rows)s) ROWS WITH TIES;

-- name: keyless
-- purpose: Rows of that table that have no key.
SELECT count(*) AS rows FROM {source} s WHERE s.{key} IS NULL;
