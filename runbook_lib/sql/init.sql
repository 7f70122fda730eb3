-- What `runbook init` looks at to suggest parameters. Reads only.

-- name: tables
-- purpose: Tables that hold text, the largest first.
SELECT n.nspname::text AS schema, c.relname::text AS table,
    (SELECT coalesce(sum(pg_table_size(p.relid)), 0) FROM pg_partition_tree(c.oid) p)::bigint
        + CASE WHEN c.relkind = 'r' THEN pg_table_size(c.oid) ELSE 0 END AS bytes
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname NOT IN ('pg_catalog', 'information_schema')
  AND n.nspname !~ '^pg_(toast|temp)' AND n.nspname <> %(ledger)s
  AND EXISTS (SELECT FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
              WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND t.typcategory = 'S')
ORDER BY 3 DESC, 1, 2 LIMIT 20;

-- name: columns
-- purpose: The columns with type, default or generating expression, and what the last ANALYZE saw in them.
SELECT a.attname::text AS name, format_type(a.atttypid, NULL) AS type, t.typcategory = 'S' AS is_text,
    t.typcategory::text AS category, a.attnotnull AS not_null, pg_get_expr(d.adbin, d.adrelid) AS expression,
    s.n_distinct::float8 AS n_distinct, s.avg_width
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
LEFT JOIN LATERAL (
    SELECT p.n_distinct, p.avg_width FROM pg_stats p
    WHERE p.schemaname = %(schema)s AND p.tablename = %(table)s AND p.attname = a.attname
    ORDER BY p.inherited DESC LIMIT 1
) s ON true
WHERE a.attrelid = to_regclass(%(relation)s) AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum;

-- name: keys
-- purpose: NOT NULL columns with a valid unique index on them alone, without a condition: the primary key first, then those of one column.
SELECT k.columns, k.types, bool_or(i.indisprimary) AS is_primary FROM pg_index i CROSS JOIN LATERAL (
    SELECT array_agg(a.attname::text ORDER BY place) AS columns, bool_and(a.attnotnull) AS not_null,
           array_agg(format_type(a.atttypid, NULL) ORDER BY place) AS types
    FROM generate_series(0, i.indnkeyatts - 1) AS place
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[place]
) k
WHERE i.indrelid = to_regclass(%(relation)s) AND i.indisunique AND i.indisvalid AND i.indimmediate
  AND i.indpred IS NULL AND i.indexprs IS NULL AND k.not_null
GROUP BY 1, 2 ORDER BY 3 DESC, cardinality(k.columns), 1;

-- name: settings
-- purpose: The server's settings of memory, workers and language.
SELECT pg_size_bytes(current_setting('effective_cache_size'))::bigint AS effective_cache_bytes,
    current_setting('max_parallel_maintenance_workers')::int AS maintenance_workers,
    current_setting('max_parallel_workers')::int AS workers,
    current_setting('default_text_search_config') AS text_search_config;

-- name: fulltext_indexes
-- purpose: Expressions of type tsvector that an index without a condition is on, the longest first, names spelt whole.
SELECT c.relname::text AS index, pg_get_indexdef(i.indexrelid, k.n, false) AS expression
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam
CROSS JOIN LATERAL generate_series(1, i.indnkeyatts::int) AS k (n)
JOIN pg_opclass o ON o.oid = i.indclass[k.n - 1]
WHERE i.indrelid = to_regclass(%(relation)s) AND i.indisvalid AND i.indpred IS NULL AND i.indkey[k.n - 1] = 0
  AND o.opcintype = 'tsvector'::regtype AND am.amname IN ('gin', 'gist')
ORDER BY length(pg_get_indexdef(i.indexrelid, k.n, false)) DESC, c.relname;

-- name: readers
-- purpose: Roles with SELECT on the table, other than its owner.
SELECT DISTINCT r.rolname::text AS role
FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) x JOIN pg_roles r ON r.oid = x.grantee
WHERE c.oid = to_regclass(%(relation)s) AND x.privilege_type = 'SELECT' AND x.grantee <> c.relowner
ORDER BY 1;

-- name: titles
-- purpose: Texts of one column from a sample of the table's pages, for starter queries.
SELECT left({column}::text, 400) AS text FROM {table} {tablesample}
WHERE length(btrim({column}::text)) > 2 LIMIT %(rows)s;
