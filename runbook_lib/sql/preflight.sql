-- Phase 00: reads only. What the table, its neighbours and the server look like before anything is changed.

-- name: table
-- purpose: Size, structure and write statistics of the table; its partitions' figures are summed.
WITH part AS (
    SELECT c.oid FROM pg_class c WHERE c.oid = to_regclass(%(table)s) AND c.relkind = 'r'
    UNION SELECT p.relid FROM pg_partition_tree(to_regclass(%(table)s)) p WHERE p.isleaf
)
SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint AS estimated_rows,
    coalesce(max(greatest(c.reltuples, 0)), 0)::bigint AS largest_partition_rows,
    count(*) FILTER (WHERE c.oid <> to_regclass(%(table)s)) AS partitions,
    coalesce(sum(pg_relation_size(c.oid)), 0)::bigint AS heap_bytes,
    coalesce(sum(pg_table_size(c.oid) - pg_relation_size(c.oid)), 0)::bigint AS toast_bytes,
    coalesce(sum(pg_indexes_size(c.oid)), 0)::bigint AS indexes_bytes,
    coalesce(max(substring(array_to_string(c.reloptions, ',') FROM 'fillfactor=(\d+)')::int), 100) AS fillfactor,
    coalesce(sum(s.n_tup_upd), 0)::bigint AS updates,
    coalesce(sum(s.n_tup_hot_upd), 0)::bigint AS hot_updates,
    coalesce(sum(s.n_tup_ins), 0)::bigint AS inserts,
    coalesce(sum(s.n_dead_tup), 0)::bigint AS dead_rows,
    (SELECT extract(epoch FROM now() - coalesce(d.stats_reset, pg_postmaster_start_time()))::float8
     FROM pg_stat_database d WHERE d.datname = current_database()) AS counted_for_s
FROM part JOIN pg_class c USING (oid) LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid;

-- name: indexes
-- purpose: The table's indexes with their sizes, those of partitions added up; each of them is written to by an update that is not HOT.
SELECT i.indexrelid::regclass::text AS index, m.amname::text AS method,
    (WITH RECURSIVE part AS (
        SELECT i.indexrelid AS oid UNION ALL SELECT h.inhrelid FROM part JOIN pg_inherits h ON h.inhparent = part.oid
     ) SELECT sum(pg_relation_size(oid)) FROM part)::bigint AS bytes, i.indisvalid AS valid
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
WHERE i.indrelid = to_regclass(%(table)s) ORDER BY 1;

-- name: inverted
-- purpose: The table's inverted indexes, which enter a row once for each of its words or trigrams.
SELECT bool_or(o.opcname LIKE '%%trgm%%') AS of_trigrams
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
JOIN pg_opclass o ON o.oid = ANY (i.indclass::oid[])
WHERE i.indrelid = to_regclass(%(table)s) AND m.amname = 'gin' GROUP BY i.indexrelid;

-- name: triggers
-- purpose: Triggers that will fire for the backfill's updates, apart from those of foreign keys.
SELECT t.tgname::text AS name FROM pg_trigger t
WHERE t.tgrelid = to_regclass(%(table)s) AND NOT t.tgisinternal ORDER BY 1;

-- name: settings
-- purpose: The server's settings that a build, a backfill or a replica depend on.
SELECT s.name, current_setting(s.name) AS value FROM pg_settings s
WHERE s.name IN ('maintenance_work_mem', 'max_parallel_maintenance_workers', 'max_parallel_workers', 'shared_buffers',
    'max_wal_size', 'wal_level', 'archive_mode', 'autovacuum', 'max_slot_wal_keep_size')
ORDER BY 1;

-- name: replicas
-- purpose: Standbys and other receivers of WAL, with how far they are behind where this role may see it.
SELECT coalesce(r.application_name, '') AS name, r.state, r.sync_state,
    extract(epoch FROM r.replay_lag)::float8 AS lag_s FROM pg_stat_replication r ORDER BY 1;

-- name: snapshots
-- purpose: Transactions of this database that are open, the oldest first; a concurrent build waits for them.
SELECT a.pid, a.usename::text AS role, a.application_name AS application, a.state,
    extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS age_s
FROM pg_stat_activity a
WHERE a.datid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
  AND a.backend_type = 'client backend' AND a.xact_start IS NOT NULL AND a.pid <> pg_backend_pid()
ORDER BY a.xact_start;

-- name: hidden_sessions
-- purpose: How many sessions of this database are hidden from this role.
SELECT count(*) AS hidden, quote_ident(current_user) AS role FROM pg_stat_activity a
WHERE a.datid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
  AND a.query = '<insufficient privilege>';

-- name: prepared
-- purpose: Prepared transactions of this database; nothing ends them but their own COMMIT or ROLLBACK PREPARED.
SELECT p.gid, p.owner::text AS owner, extract(epoch FROM now() - p.prepared)::float8 AS age_s
FROM pg_prepared_xacts p WHERE p.database = current_database() ORDER BY p.prepared;

-- name: texts
-- purpose: The texts of some rows, cut where they are very long, and how long they are.
SELECT left({text}, %(longest)s) AS text, t.{first_text_column}::text AS title, length({text}) AS length FROM {table} t {tablesample}
WHERE {has_text} LIMIT %(rows)s;

-- name: sample
-- purpose: A sample of rows: their text, cut, and how wide text and row are.
SELECT left({text}, %(longest)s) AS text, {has_text} AS has_text, octet_length({text}) AS text_bytes,
       pg_column_size(t.*) AS row_bytes
FROM {table} t {tablesample} LIMIT %(rows)s;
