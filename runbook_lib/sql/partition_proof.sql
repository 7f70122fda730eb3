-- Which partitions a search touches.

-- name: touched
-- purpose: Partitions with rows on which this transaction holds a lock, and other relations that it should not touch.
SELECT DISTINCT c.oid::regclass::text AS name
FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND c.relkind = 'r'
  AND (l.relation IN (SELECT relid FROM pg_partition_tree(to_regclass(%(table)s)) WHERE isleaf)
       OR l.relation IN (SELECT to_regclass(o) FROM unnest(%(others)s::text[]) AS o))
ORDER BY 1;
