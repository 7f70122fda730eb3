-- IVFFlat lists that have aged. All of it only reads.

-- name: built
-- purpose: When the build of the index began, and of how many rows its lists were made.
SELECT written_at - make_interval(secs => (body->>'seconds')::float8) AS began_at, (body->>'rows')::bigint AS rows
FROM {counted} e
WHERE target = {target_name} AND kind = 'index' AND body->>'method' = 'ivfflat' AND body ? 'seconds'
ORDER BY seq DESC LIMIT 1;

-- name: sides
-- purpose: How many of the sampled rows have a vector newer than the index.
SELECT count(*) AS rows, count(*) FILTER (WHERE {row_embedding_updated_at} > %(began_at)s) AS newer
FROM {from_vectors} WHERE {row_embedding} IS NOT NULL AND {looked_at};

-- name: some_rows
-- purpose: Vectors of some rows that are newer than the index, or of some that are not.
SELECT {one t.key}::text AS key, {row_embedding} AS embedding FROM {from_vectors}
WHERE {row_embedding} IS NOT NULL AND {looked_at}
  AND coalesce({row_embedding_updated_at} > %(began_at)s, false) = %(newer)s
ORDER BY random() LIMIT %(n)s;

-- name: one_list
-- purpose: Look into one list alone, through the index alone.
SELECT set_config('ivfflat.probes', '1', true), set_config('ivfflat.iterative_scan', 'off', true),
       set_config('enable_seqscan', 'off', true), set_config('enable_sort', 'off', true),
       set_config('enable_bitmapscan', 'off', true);

-- name: rows_of_the_list
-- purpose: Rows in the list that is nearest to a vector.
SELECT count(*) AS rows FROM (
    SELECT FROM {vectors} t ORDER BY {indexed} {index_distance} {query_indexed} LIMIT %(most)s
) AS in_the_list;
