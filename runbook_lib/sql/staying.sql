-- Phase 50: how many updates will stay on their page.

-- name: columns
-- purpose: The columns as they lie in a row: length (-1 where it varies), alignment, storage.
SELECT attname AS name, attlen AS length, attalign::text AS align, attstorage::text AS storage,
       attname = ANY (%(added)s) AS added
FROM pg_attribute WHERE attrelid = to_regclass(%(part)s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum;

-- name: sample
-- purpose: Some whole blocks, as the rows on them: the bytes of every value of a row, null where it is null.
SELECT (t.ctid::text::point)[0]::bigint AS block, {waits} AS waits, ARRAY[{sizes}]::int[] AS sizes
FROM ONLY {part} t TABLESAMPLE SYSTEM (%(percent)s::real) REPEATABLE (1);
