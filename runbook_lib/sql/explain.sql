-- Phase 70: the plan of the query that the application really sends.

-- name: vector_indexes
-- purpose: Every vector index on this target's column, and on that of its partitions; another target has its own.
SELECT c.relname AS name, c.oid::regclass::text AS shown, c.oid AS oid, am.amname AS method,
       i.indisvalid AND i.indisready AS usable, oc.opcname AS operator_class,
       pg_get_indexdef(c.oid, 1, true) AS indexed, pg_get_expr(i.indpred, i.indrelid) AS predicate,
       substring(array_to_string(c.reloptions, ',') FROM 'lists=(\d+)')::int AS lists,
       (SELECT op.oprname FROM pg_amop ao JOIN pg_operator op ON op.oid = ao.amopopr
        WHERE ao.amopfamily = oc.opcfamily AND ao.amoppurpose = 'o' LIMIT 1) AS operator
FROM pg_index i
JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam
JOIN pg_opclass oc ON oc.oid = i.indclass[0]
WHERE am.amname IN ('hnsw', 'ivfflat')
  AND (i.indrelid = to_regclass(%(table)s) OR i.indrelid IN (SELECT relid FROM pg_partition_tree(to_regclass(%(table)s))))
  AND EXISTS (SELECT FROM pg_depend d JOIN pg_attribute a ON (a.attrelid, a.attnum) = (d.refobjid, d.refobjsubid)
              WHERE (d.classid, d.refclassid) = ('pg_class'::regclass, 'pg_class'::regclass) AND d.objid = c.oid
                AND a.attname = %(column)s)
ORDER BY c.relname;

-- name: scans
-- purpose: How often this transaction has scanned these indexes, by the server's count.
SELECT coalesce(sum(pg_stat_get_xact_numscans(o)), 0)::bigint AS scans FROM unnest(%(oids)s::oid[]) AS o;

-- name: prepared
-- purpose: The parameters of a prepared statement as the server has inferred them.
SELECT parameter_types::text[] AS types FROM pg_prepared_statements WHERE name = %(name)s;

-- name: set
-- purpose: One setting, for this transaction or this session.
SELECT set_config(%(name)s, %(value)s, %(local)s) AS value;

-- name: setting
-- purpose: The current value of a setting, and who set it.
SELECT name, setting, source FROM pg_settings WHERE name = %(name)s;

-- name: usual_value
-- purpose: The value that a column holds most often, among its first ten thousand rows.
SELECT v::text AS value FROM (SELECT t.{column} AS v FROM {table} t WHERE t.{column} IS NOT NULL LIMIT 10000) s
GROUP BY v ORDER BY count(*) DESC, v LIMIT 1;

-- name: pages
-- purpose: Pages on disk now; partitions are added up.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT coalesce(sum(pg_relation_size(c.oid) / current_setting('block_size')::int), 0)::bigint AS pages
FROM part JOIN pg_class c USING (oid) WHERE c.relkind = 'r';

-- name: way_of
-- purpose: How the search function searches by these filters, as 70_tune chose.
SELECT s.scan, {value} AS value FROM {strategy} s
WHERE s.target = {target_name} AND s.filter = %(filter)s AND (s.value = {value} OR s.value IS NULL)
ORDER BY s.value LIMIT 1;
