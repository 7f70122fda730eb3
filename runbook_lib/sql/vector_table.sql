-- Vectors that stand in another table of the same database.

-- name: columns
-- purpose: Columns of that table, and the first columns, as many as the key has, of the indexes that start with it.
SELECT a.attname AS name, format_type(a.atttypid, NULL) AS type,
       ARRAY(SELECT jsonb_agg(c.attname ORDER BY k.place) FROM pg_index i
             CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, place)
             JOIN pg_attribute c ON c.attrelid = i.indrelid AND c.attnum = k.attnum
             WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum AND k.place <= %(columns)s GROUP BY i.indexrelid) AS indexed
FROM pg_attribute a WHERE a.attrelid = to_regclass(%(source)s) AND a.attnum > 0 AND NOT a.attisdropped;

-- name: page
-- purpose: The next rows of that table in key order; rows with equal keys are kept together.
SELECT {one s.key AS key}, {value} AS embedding, {hash} AS text_hash FROM {source} s
WHERE {s.key IS NOT NULL} AND {after}
ORDER BY {s.key} FETCH FIRST (%(batch_rows)s) ROWS WITH TIES;

-- name: keyless
-- purpose: Rows of that table that have no key.
SELECT count(*) AS rows FROM {source} s WHERE {s.key IS NULL};
