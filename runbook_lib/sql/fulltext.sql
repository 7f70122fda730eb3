-- Full text, the words half of hybrid: what it is made of, and the index that serves it.

-- name: configurations
-- purpose: The text search configurations that exist.
SELECT c.cfgname::text AS name FROM pg_ts_config c ORDER BY 1;

-- name: generated
-- purpose: What a generated column is made from; no row for any other.
SELECT pg_get_expr(d.adbin, d.adrelid) AS expression FROM pg_attribute a JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = to_regclass(%(table)s) AND a.attname = %(column)s::text AND a.attgenerated <> '';

-- name: shape
-- purpose: The type of the expression, without reading a row.
SELECT {fulltext} FROM {table} t LIMIT 0;

-- name: without_scans
-- purpose: Make the planner use an index wherever it can, for this transaction.
SELECT set_config('enable_seqscan', 'off', true);

-- name: candidates
-- purpose: The indexes on a tsvector that a search for words could use, on the table and on its partitions; a part of a
-- partitioned index is named by that alone.
SELECT format('%%I.%%I', n.nspname, c.relname) AS name, c.relname::text AS bare_name, i.indrelid::bigint AS relation,
       c.relkind = 'I' AS is_parent, i.indisvalid AND i.indisready AS usable,
       EXISTS (SELECT FROM pg_inherits h WHERE c.oid IN (h.inhrelid, h.inhparent)) AS is_attached,
       EXISTS (SELECT FROM pg_stat_progress_create_index p WHERE p.index_relid = c.oid) AS being_built,
       pg_get_expr(i.indpred, i.indrelid) AS condition, pg_get_indexdef(i.indexrelid, k.n, false) AS document
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL generate_series(1, i.indnkeyatts::int) AS k (n)
JOIN pg_opclass o ON o.oid = i.indclass[k.n - 1]
JOIN pg_am am ON am.oid = c.relam
WHERE (i.indrelid = to_regclass(%(table)s) OR i.indrelid IN (SELECT relid FROM pg_partition_tree(to_regclass(%(table)s))))
  AND o.opcintype = 'tsvector'::regtype AND am.amname IN ('gin', 'gist')
  AND (c.relkind = 'I' OR NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = c.oid))
ORDER BY i.indrelid <> to_regclass(%(table)s), c.relname, k.n;

-- name: first_rows
-- purpose: The number of rows, counted up to a limit.
SELECT count(*) AS rows FROM (SELECT 1 FROM {table} LIMIT %(most)s) s;

-- name: create_probe
-- purpose: Make an empty copy of the table, for an index on the expression to be tried on; rolled back.
CREATE TEMPORARY TABLE runbook_fulltext (LIKE {table} INCLUDING GENERATED);

-- name: index_probe
-- purpose: Try the index on that empty copy.
CREATE INDEX ON pg_temp.runbook_fulltext USING gin ({fulltext});
