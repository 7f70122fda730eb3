-- Partial vector indexes: one for each filter value that is slow or has low recall without it.

-- name: standing
-- purpose: Every partial vector index on the relation that holds the vectors, valid or not.
SELECT c.relname::text AS name, i.indisvalid AND i.indisready AS usable, c.oid::bigint AS oid,
       pg_get_expr(i.indpred, i.indrelid) AS condition, pg_relation_size(c.oid) AS bytes
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam
WHERE i.indrelid = to_regclass(%(vectors)s) AND i.indpred IS NOT NULL AND am.amname IN ('hnsw', 'ivfflat')
ORDER BY c.relname;

-- name: builds_under_way
-- purpose: Index builds at work on the relation that holds the vectors.
SELECT count(*)::int AS builds FROM pg_stat_progress_create_index p WHERE p.relid = to_regclass(%(vectors)s);

-- name: table_kind
-- purpose: Is the table partitioned?
SELECT c.relkind = 'p' AS partitioned FROM pg_class c WHERE c.oid = to_regclass(%(table)s);

-- name: rows_of_values
-- purpose: Rows with a vector, by value of one filter column.
SELECT t.{column}::text AS value, count(*) AS rows FROM {from_vectors}
WHERE t.{column}::text = ANY (%(values)s) AND {row_embedding} IS NOT NULL GROUP BY 1;

-- name: create
-- purpose: Build a vector index on the rows of one filter value, while the application runs.
-- lock: SHARE UPDATE EXCLUSIVE on {vectors}, for the whole build; it waits for older transactions to end
-- undo: filters.drop
{build} WHERE {condition};

-- name: drop
-- purpose: Drop the index of one filter value, or what an unfinished build left of it.
-- lock: SHARE UPDATE EXCLUSIVE on {vectors}; it waits for older transactions that use the index
-- undo: filters.create
DROP INDEX CONCURRENTLY IF EXISTS {partial_index};

-- name: strategy_of
-- purpose: How a filter value is searched: by its own row, or by the row for unlisted values.
SELECT s.value, s.scan, s.candidates, s.iterative_scan, s.most_scanned, s.share, s.recall, s.p50_ms
FROM {strategy} s
WHERE s.target = {target_name} AND s.filter = %(filter)s AND (s.value = %(value)s OR s.value IS NULL)
ORDER BY s.value LIMIT 1;

-- name: forget_strategy
-- purpose: Forget how one filter value is searched; it is then searched like unlisted values.
-- lock: one row of the strategy table
-- undo: search.learn_strategy
DELETE FROM {strategy} WHERE target = {target_name} AND filter = %(filter)s AND value = %(value)s;
