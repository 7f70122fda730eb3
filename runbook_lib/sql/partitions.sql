-- What a partitioned table consists of. All of it reads, and none of it locks a partition.

-- name: tree
-- purpose: The table and every partition at any depth; an ordinary table is the only row.
WITH RECURSIVE tree AS (
    SELECT c.oid, NULL::oid AS parent, 0 AS level FROM pg_class c WHERE c.oid = to_regclass(%(table)s)
    UNION ALL
    SELECT i.inhrelid, i.inhparent, t.level + 1
    FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid JOIN pg_class c ON c.oid = i.inhrelid AND c.relispartition
)
SELECT c.oid::bigint AS oid, t.parent::bigint AS parent, t.level, n.nspname::text AS schema, c.relname::text AS name,
       format('%%I.%%I', n.nspname, c.relname) AS shown, c.relkind::text AS kind,
       greatest(c.reltuples, 0)::bigint AS rows
FROM tree t JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY t.level, c.oid;

-- name: indexes
-- purpose: Every index of these names on these relations, and every vector index, with the one that each is attached to.
SELECT i.indrelid::bigint AS relation, c.oid::bigint AS oid, n.nspname::text AS schema, c.relname::text AS name,
       format('%%I.%%I', n.nspname, c.relname) AS shown, i.indisvalid AND i.indisready AS usable,
       h.inhparent::bigint AS attached_to, am.amname::text AS method, oc.opcname::text AS operator_class,
       pg_get_indexdef(c.oid, 1, true) AS indexed, i.indpred IS NOT NULL AS partial, coalesce(c.reloptions, '{{}}') AS options,
       EXISTS (SELECT FROM pg_depend d JOIN pg_attribute a ON (a.attrelid, a.attnum) = (d.refobjid, d.refobjsubid)
               WHERE (d.classid, d.refclassid) = ('pg_class'::regclass, 'pg_class'::regclass) AND d.objid = c.oid
                 AND a.attname = %(column)s) AS on_column,
       CASE WHEN c.relkind = 'i' THEN pg_relation_size(c.oid) ELSE 0 END AS bytes,
       (SELECT count(*) FROM pg_stat_progress_create_index p WHERE p.index_relid = c.oid OR p.relid = i.indrelid)::int
           AS builds_under_way
FROM pg_index i
JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_am am ON am.oid = c.relam JOIN pg_opclass oc ON oc.oid = i.indclass[0]
LEFT JOIN pg_inherits h ON h.inhrelid = c.oid
WHERE i.indrelid = ANY (%(relations)s::oid[]) AND (am.amname IN ('hnsw', 'ivfflat') OR c.relname = %(name)s)
ORDER BY c.relname, c.oid;

-- name: key
-- purpose: What keeps the key of a partitioned table unique: an index that includes it, and where it is generated.
SELECT
    (SELECT i.indexrelid::regclass::text FROM pg_index i JOIN pg_am am
        ON am.oid = (SELECT c.relam FROM pg_class c WHERE c.oid = i.indexrelid)
     WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum AND am.amname = 'btree' AND i.indisvalid
       AND i.indpred IS NULL ORDER BY i.indisunique DESC, i.indexrelid LIMIT 1) AS led_index,
    CASE WHEN a.attidentity <> '' THEN 'its identity'
         WHEN pg_get_expr(d.adbin, d.adrelid) ~* '^(\w+\.)?(nextval|gen_random_uuid|uuidv\d|uuid_generate_v\w+)\('
         THEN pg_get_expr(d.adbin, d.adrelid) END AS drawn_from
FROM pg_attribute a LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
WHERE a.attrelid = %(oid)s AND a.attname = %(key)s AND NOT a.attisdropped;

-- name: twice
-- purpose: One key that occurs twice; no row where every key occurs once. It reads every key.
SELECT {one t.key}::text AS key FROM {table} t GROUP BY {t.key} HAVING count(*) > 1 LIMIT 1;

-- name: captured
-- purpose: Partitions on which a capture trigger is missing or switched off.
SELECT format('%%I.%%I', n.nspname, c.relname) AS shown
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = ANY (%(relations)s::oid[])
  AND (SELECT count(*) FROM pg_trigger g
       WHERE g.tgrelid = c.oid AND g.tgenabled = 'A' AND g.tgname = ANY (%(triggers)s)) < %(wanted)s
ORDER BY c.oid;

-- name: with_their_parents
-- purpose: These indexes, and the partitioned ones that they are part of.
WITH RECURSIVE up AS (
    SELECT c.oid, c.relname FROM pg_class c WHERE c.relname = ANY (%(names)s) AND c.relkind IN ('i', 'I')
    UNION
    SELECT p.oid, p.relname FROM up JOIN pg_inherits h ON h.inhrelid = up.oid JOIN pg_class p ON p.oid = h.inhparent
)
SELECT DISTINCT relname::text AS name FROM up;
