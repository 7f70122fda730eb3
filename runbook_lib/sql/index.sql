-- The vector index: one on each partition, under one on the parent that holds no row; of an ordinary table just one.

-- name: create_hnsw
-- purpose: Build the HNSW index while the application runs.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}, for the whole build; it waits for older transactions to end
-- undo: index.drop
CREATE INDEX CONCURRENTLY {index} ON {relation} USING hnsw ({indexed} {operator_class})
    WITH (m = {m}, ef_construction = {ef_construction}){of_rows};

-- name: create_ivfflat
-- purpose: Build the IVFFlat index while the application runs.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}, for the whole build; it waits for older transactions to end
-- undo: index.drop
CREATE INDEX CONCURRENTLY {index} ON {relation} USING ivfflat ({indexed} {operator_class}) WITH (lists = {lists}){of_rows};

-- name: drop
-- purpose: Drop the vector index, or what an unfinished build left of it.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}; it waits for older transactions that use the index
-- undo: index.create_hnsw
DROP INDEX CONCURRENTLY IF EXISTS {dropped};

-- name: settings
-- purpose: Give this session alone the memory and workers for a build, and no limit on its waits.
SELECT set_config('maintenance_work_mem', %(memory)s, false),
       set_config('max_parallel_maintenance_workers', %(workers)s, false),
       set_config('lock_timeout', '0', false), set_config('statement_timeout', '0', false);

-- name: in_the_way
-- purpose: Transactions that a concurrent build will have to wait for.
SELECT pid, usename, application_name, state, extract(epoch FROM now() - xact_start)::int AS seconds
FROM pg_stat_activity
WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND pid <> pg_backend_pid()
  AND datname = current_database() AND backend_type = 'client backend' AND now() - xact_start > interval '1 s'
ORDER BY xact_start;

-- name: progress
-- purpose: How far the build is.
SELECT phase, blocks_done, blocks_total, tuples_done FROM pg_stat_progress_create_index WHERE pid = %(pid)s;

-- name: rows
-- purpose: Rows that the index of a table or partition should hold.
SELECT count(*) AS rows FROM {relation} t WHERE t.{embedding} IS NOT NULL AND {is_indexed};

-- name: known_row
-- purpose: Vectors of known rows, spread over the table, to be found again through the index.
SELECT {one t.key AS key}, t.{embedding} AS embedding FROM {vectors} t {sampled}
WHERE t.{embedding} IS NOT NULL AND {is_indexed} ORDER BY t.{embedding_hash} LIMIT %(n)s;

-- name: nearest
-- purpose: The distance of the nearest row, through the index and of what it holds.
SELECT {indexed} {index_distance} {query_indexed} AS distance FROM {vectors} t
WHERE {is_indexed} ORDER BY {indexed} {index_distance} {query_indexed} LIMIT 1;

-- name: own_distance
-- purpose: The distance of a vector to itself, by the same operator.
SELECT {query_indexed} {index_distance} {query_indexed} AS distance;
