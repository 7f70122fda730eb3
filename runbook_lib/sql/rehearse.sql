-- The rehearsal: a sample of the table in a scratch schema. The target is only read.

-- name: scratch
-- purpose: Does the scratch schema exist, and did a rehearsal make it?
SELECT n.oid IS NOT NULL AS there, coalesce(obj_description(n.oid, 'pg_namespace') = {mark}, false) AS ours
FROM (SELECT to_regnamespace(%(scratch)s)::oid AS oid) n;

-- name: rights
-- purpose: What a rehearsal in this database needs: pgvector, and the privilege to create a schema.
SELECT has_database_privilege(current_database(), 'CREATE') AS may_create, quote_ident(current_user) AS role,
       quote_ident(current_database()) AS database,
       (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS pgvector;

-- name: create_scratch
-- purpose: Create the scratch schema of the rehearsal, and mark it as such.
-- lock: none on the target
-- undo: rehearse.drop_scratch
CREATE SCHEMA {scratch};
COMMENT ON SCHEMA {scratch} IS {mark};

-- name: drop_scratch
-- purpose: Drop the scratch schema with everything in it.
-- lock: none on the target
-- undo: none needed; it held copies only
DROP SCHEMA IF EXISTS {scratch} CASCADE;

-- name: create_sample
-- purpose: Create an empty table like the target, with its indexes, in the scratch schema.
-- lock: ACCESS SHARE on {table}
-- undo: rehearse.drop_scratch
CREATE TABLE {sample} (LIKE {table} INCLUDING STORAGE INCLUDING INDEXES)
    WITH (fillfactor = {fillfactor}, autovacuum_enabled = off, parallel_workers = {parallel_workers});
ALTER TABLE {sample}
    DROP COLUMN IF EXISTS {embedding}, DROP COLUMN IF EXISTS {embedding_updated_at},
    DROP COLUMN IF EXISTS {embedding_hash};

-- name: fill_sample
-- purpose: Copy a sample of the target's pages into it; other pages are not read.
-- lock: ACCESS SHARE on {table}
-- undo: rehearse.drop_scratch
INSERT INTO {sample} ({columns})
SELECT {columns} FROM {table} TABLESAMPLE SYSTEM ({percent}) REPEATABLE ({seed}) LIMIT {rows};

-- name: columns
-- purpose: The target's columns without the runbook's own.
SELECT a.attname::text AS name FROM pg_attribute a
WHERE a.attrelid = to_regclass(%(table)s) AND a.attnum > 0 AND NOT a.attisdropped AND NOT a.attname = ANY (%(added)s)
ORDER BY a.attnum;

-- name: vacuum
-- purpose: Leave the sample like a table in use: vacuumed and analyzed.
VACUUM (ANALYZE) {table};

-- name: page
-- purpose: The next rows of the sample that have text, in key order.
SELECT {one t.key AS key}, {text_hash} AS text_hash FROM {table} t
WHERE {after} AND {has_text} ORDER BY {t.key} LIMIT %(batch_rows)s;

-- name: has_column
-- purpose: Does the relation have this column, with a pgvector type?
SELECT EXISTS (
    SELECT FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
    WHERE a.attrelid = to_regclass(%(relation)s) AND a.attname = %(column)s AND NOT a.attisdropped
      AND y.typname IN ('vector', 'halfvec')
) AS there;

-- name: vectors_of
-- purpose: Vectors of these rows that the target or its staging table already has.
SELECT {source_key}, s.{source_vector} AS embedding FROM {source} s
WHERE {is_among} AND s.{source_vector} IS NOT NULL;

-- name: wal
-- purpose: The WAL position of the whole server.
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint AS bytes;

-- name: relation_bytes
-- purpose: Size of a relation with its TOAST.
SELECT pg_table_size(to_regclass(%(relation)s))::bigint AS bytes;

-- name: build_settings
-- purpose: Give this session the memory and workers of a build, and end one that takes too long.
SELECT set_config('maintenance_work_mem', %(memory)s, false),
       set_config('max_parallel_maintenance_workers', %(workers)s, false),
       set_config('lock_timeout', '0', false), set_config('statement_timeout', %(timeout)s, false);

-- name: some_keys
-- purpose: Keys of some rows with a vector, spread over the sample.
SELECT {one t.key AS key} FROM {from_vectors}
WHERE {row_embedding} IS NOT NULL ORDER BY md5({one t.key}::text) LIMIT %(rows)s;

-- name: write
-- purpose: Change the text of some rows of the sample as an application would, to see what a write costs; rolled back.
-- lock: none on the target
-- undo: rolled back
UPDATE {table} SET {first_text_column} = coalesce({first_text_column}, '') || ' ' WHERE {key IN %keys};

-- name: without_index
-- purpose: Drop the sample's vector index, to see what a write costs without it; rolled back.
-- lock: none on the target
-- undo: rolled back
DROP INDEX {qualified_index};

-- name: without_capture
-- purpose: Disable the runbook's triggers on the sample, to see what a write costs without them; rolled back.
-- lock: none on the target
-- undo: rolled back
ALTER TABLE {table} DISABLE TRIGGER USER;
