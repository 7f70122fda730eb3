-- The finished index read into shared_buffers, where the parameters ask for it.

-- name: extension
-- purpose: The schema of pg_prewarm, if it is installed in this database, and whether the server offers it.
SELECT (SELECT n.nspname::text FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
        WHERE e.extname = 'pg_prewarm') AS schema,
       EXISTS (SELECT FROM pg_available_extensions a WHERE a.name = 'pg_prewarm') AS offered,
       quote_ident(current_database()) AS database;

-- name: index
-- purpose: The index, or its parts in the partitions, in blocks; and the blocks that shared_buffers hold.
WITH part AS (
    SELECT to_regclass(%(index)s)::oid AS oid
    UNION SELECT p.relid FROM pg_partition_tree(to_regclass(%(index)s)) p WHERE p.isleaf
)
SELECT c.oid::regclass::text AS part, pg_relation_size(c.oid) / current_setting('block_size')::int AS blocks,
       (SELECT s.setting::bigint FROM pg_settings s WHERE s.name = 'shared_buffers') AS buffers
FROM part JOIN pg_class c USING (oid) JOIN pg_index i ON i.indexrelid = c.oid
WHERE c.relkind = 'i' AND i.indisvalid ORDER BY 1;

-- name: read
-- purpose: Read the index into shared_buffers, up to the last block that they are to hold.
-- lock: ACCESS SHARE on the index
-- undo: none needed; other pages take the room as they are wanted
SELECT {prewarm}(%(part)s::regclass, 'buffer', 'main', 0, %(last)s) AS blocks;
