-- The state of a target, in queries that are quick however large the table and the ledger are. They only read.

-- name: verdicts
-- purpose: The newest verdict of each step of this target.
SELECT DISTINCT ON (e.phase) e.phase, e.seq, e.run_id, e.written_by, e.written_at, e.body ->> 'verdict' AS verdict
FROM {counted} e WHERE e.target = {target_name} AND e.kind = 'phase' ORDER BY e.phase, e.seq DESC;

-- name: statements
-- purpose: The newest statement that each step of this target ran.
SELECT DISTINCT ON (e.phase) e.phase, e.seq, e.run_id, e.written_by, e.written_at
FROM {counted} e WHERE e.target = {target_name} AND e.kind = 'statement' ORDER BY e.phase, e.seq DESC;

-- name: failed_gate
-- purpose: The newest gate of a step that did not pass; in its run, one that failed before one that was not asked.
SELECT e.seq, e.body ->> 'name' AS name, e.body ->> 'found' AS found,
       first_value(e.run_id) OVER (ORDER BY e.seq DESC) = e.run_id AS is_newest
FROM {counted} e
WHERE e.target = {target_name} AND e.kind = 'gate' AND e.phase = ANY (%(phases)s)
  AND e.body ->> 'verdict' IN ('FAIL', 'UNKNOWN')
ORDER BY is_newest DESC, e.body ->> 'verdict', e.seq DESC LIMIT 1;

-- name: extent
-- purpose: The planner's estimate of the table's rows, and its pages; partitions are added up.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint AS rows,
       coalesce(sum(pg_relation_size(c.oid)), 0)::bigint / current_setting('block_size')::bigint AS pages
FROM part JOIN pg_class c USING (oid) WHERE c.relkind = 'r';

-- name: some_keys
-- purpose: Keys of the rows on some of the table's pages.
SELECT {one s.key AS key} FROM {table} AS s TABLESAMPLE SYSTEM (%(percent)s);

-- name: of_these_keys
-- purpose: Part of the freshness query: rows that were sampled before.
{t.key IN %keys};

-- name: queue
-- purpose: Changes that wait for a vector, counted up to a limit, and for how long the oldest has waited.
SELECT (SELECT count(*) FROM (SELECT FROM {queue} LIMIT %(most)s) AS q) AS changes,
       coalesce((SELECT extract(epoch FROM clock_timestamp() - q.queued_at) FROM {queue} q ORDER BY q.id LIMIT 1), 0)
           ::float8 AS oldest_s;
