-- Retiring the legacy search: the indexes that are no longer read, and the branch of the function that read them.

-- name: indexes
-- purpose: Every index of the table except vector indexes: its columns, what else needs it, and its definition.
SELECT c.relname::text AS name, c.oid::bigint AS oid, pg_relation_size(c.oid) AS bytes, pg_get_indexdef(c.oid) AS definition,
       obj_description(c.oid, 'pg_class') AS comment,
       ARRAY(SELECT o.opcname::text FROM pg_opclass o WHERE o.oid = ANY (i.indclass)) AS operator_classes,
       ARRAY(SELECT DISTINCT a.attname::text FROM pg_depend d
             JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
             WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass
               AND d.refobjid = i.indrelid AND d.refobjsubid > 0) AS columns,
       i.indisvalid AS valid, i.indisunique AS is_unique, i.indisreplident AS is_replica_identity,
       i.indisclustered AS is_clustered, c.reltablespace <> 0 AS in_a_tablespace, c.relkind = 'I' AS is_partitioned,
       EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = c.oid) AS is_of_a_constraint,
       pg_stat_get_numscans(c.oid) AS scans
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam
WHERE i.indrelid = to_regclass(%(table)s) AND am.amname NOT IN ('hnsw', 'ivfflat')
ORDER BY c.relname;

-- name: last_scans
-- purpose: When each index of the table was last scanned, if the server records it.
SELECT indexrelname::text AS name, extract(epoch FROM last_idx_scan)::float8 AS last_s
FROM pg_stat_user_indexes WHERE relid = to_regclass(%(table)s);

-- name: scans
-- purpose: Scans of the table's indexes, as counted by this server.
SELECT indexrelname::text AS name, idx_scan AS scans FROM pg_stat_user_indexes WHERE relid = to_regclass(%(table)s);

-- name: counted_since
-- purpose: The time, and when the counting of this database's scans began; a crash resets the counters.
SELECT extract(epoch FROM clock_timestamp())::float8 AS at_s,
       extract(epoch FROM greatest(d.stats_reset, b.stats_reset))::float8 AS reset_s
FROM pg_stat_database d, pg_stat_bgwriter b WHERE d.datname = current_database();

-- name: standbys
-- purpose: Standbys of this server, which count their own scans.
SELECT count(*)::int AS standbys FROM pg_stat_replication WHERE state IS DISTINCT FROM 'backup';

-- name: earlier_look
-- purpose: The newest look at the counters before a time.
SELECT body FROM {counted} e
WHERE target = {target_name} AND kind = 'retire_look' AND (body->>'at_s')::float8 <= %(before)s
ORDER BY seq DESC LIMIT 1;

-- name: generated
-- purpose: The type and expression of a generated column; no row for any other column.
SELECT format_type(a.atttypid, a.atttypmod) AS type, pg_get_expr(d.adbin, d.adrelid) AS expression,
       pg_relation_size(a.attrelid) AS table_bytes
FROM pg_attribute a JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = to_regclass(%(table)s) AND a.attname = %(column)s AND a.attgenerated = 's';

-- name: column_is_there
-- purpose: Does the table have this column?
SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass(%(table)s) AND attname = %(column)s
               AND NOT attisdropped) AS there;

-- name: sample
-- purpose: Some of the rows in a temporary table, to time an index build; rolled back.
CREATE TEMPORARY TABLE runbook_sample ON COMMIT DROP AS SELECT * FROM {table} t TABLESAMPLE SYSTEM ({percent}) LIMIT {rows};

-- name: keep_reads
-- purpose: Refuse to send reads back to the legacy search.
-- lock: ACCESS EXCLUSIVE on the route table, for milliseconds; calls of the search function wait that long
-- undo: retire.let_reads_back
ALTER TABLE {route} ADD CONSTRAINT {retired}
    CHECK (target <> {target_name} OR (route <> 'legacy' AND share_percent = 100));

-- name: let_reads_back
-- purpose: Let reads go back to the legacy search.
-- lock: ACCESS EXCLUSIVE on the route table, for milliseconds; calls of the search function wait that long
-- undo: retire.keep_reads
ALTER TABLE {route} DROP CONSTRAINT IF EXISTS {retired};

-- name: drop_index
-- purpose: Drop an index that only the legacy search used.
-- lock: SHARE UPDATE EXCLUSIVE on {table}; it waits for older transactions that use the index
-- undo: undo/retire_legacy builds it again, concurrently, from the definition in the ledger
DROP INDEX CONCURRENTLY IF EXISTS {index_to_drop};

-- name: create_index
-- purpose: Rebuild a retired index from its definition in the ledger.
-- lock: SHARE UPDATE EXCLUSIVE on {table}, for the whole build; it waits for older transactions to end
-- undo: retire.drop_index
{definition};

-- name: comment_on_index
-- purpose: Restore the index's comment.
-- lock: SHARE UPDATE EXCLUSIVE on the index, for milliseconds
-- undo: none needed
COMMENT ON INDEX {commented} IS {comment};

-- name: drop_column
-- purpose: Drop the generated full-text column.
-- lock: ACCESS EXCLUSIVE on {table}, for milliseconds
-- undo: retire.add_column, which rewrites the whole table
ALTER TABLE {table} DROP COLUMN IF EXISTS {fulltext};

-- name: add_column
-- purpose: Recreate the generated full-text column, which rewrites and locks the whole table.
-- lock: ACCESS EXCLUSIVE on {table}, for as long as rewriting it takes
-- undo: retire.drop_column
ALTER TABLE {table} ADD COLUMN {fulltext} {column_type} GENERATED ALWAYS AS ({expression}) STORED;
