-- The vector index built again beside the one that serves, proved, and put into its place.

-- name: standing
-- purpose: Every vector index on this target's column, whole or left over; another target has its own.
SELECT c.relname::text AS name, i.indisvalid AND i.indisready AS usable, am.amname::text AS method,
       oc.opcname::text AS operator_class, pg_get_indexdef(c.oid, 1, true) AS indexed,
       coalesce(c.reloptions, '{{}}') AS options, pg_relation_size(c.oid) AS bytes, c.oid::bigint AS oid,
       (SELECT count(*) FROM pg_stat_progress_create_index p WHERE p.index_relid = c.oid OR p.relid = i.indrelid)::int
           AS builds_under_way
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam
JOIN pg_opclass oc ON oc.oid = i.indclass[0]
WHERE i.indrelid = to_regclass(%(vectors)s) AND am.amname IN ('hnsw', 'ivfflat')
  AND EXISTS (SELECT FROM pg_depend d JOIN pg_attribute a ON (a.attrelid, a.attnum) = (d.refobjid, d.refobjsubid)
              WHERE (d.classid, d.refclassid) = ('pg_class'::regclass, 'pg_class'::regclass) AND d.objid = c.oid
                AND a.attname = %(column)s)
ORDER BY c.relname;

-- name: drop
-- purpose: Drop an index that serves no longer, or that an unfinished build left over.
-- lock: SHARE UPDATE EXCLUSIVE on {vectors}; it waits for older transactions that use the index
-- undo: rebuild.undo builds it again
DROP INDEX CONCURRENTLY IF EXISTS {leftover};

-- name: swap
-- purpose: Give the proved index the name of the one that served, in one transaction.
-- lock: SHARE UPDATE EXCLUSIVE on both indexes, for milliseconds
-- undo: rebuild.swap_back
ALTER INDEX {qualified_index} RENAME TO {old_index};
ALTER INDEX {qualified_new_index} RENAME TO {index};

-- name: swap_back
-- purpose: Give the index that served before its name again, in one transaction.
-- lock: SHARE UPDATE EXCLUSIVE on both indexes, for milliseconds
-- undo: rebuild.swap
ALTER INDEX {qualified_index} RENAME TO {new_index};
ALTER INDEX {qualified_old_index} RENAME TO {index};

-- name: definition
-- purpose: The search function as a statement that makes it again.
SELECT pg_get_functiondef(p.oid) AS definition FROM pg_proc p
WHERE p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s AND {of_trusted_owner};
