-- What the server says about how much more it can bear. Each block reads, and one row or none comes back.

-- name: replicas
-- purpose: The standby that is furthest behind, in bytes and in time.
SELECT coalesce(nullif(application_name, ''), 'a standby') AS name, state,
       pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn)::bigint AS lag_bytes,
       extract(epoch FROM replay_lag)::float8 AS lag_s, replay_lsn IS NULL AND state IS NULL AS hidden
FROM pg_stat_replication WHERE state IS DISTINCT FROM 'backup'
ORDER BY 3 DESC NULLS FIRST LIMIT 1;

-- name: wal
-- purpose: The WAL position, how much was written since the last checkpoint, and how much may be.
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8 AS position,
       extract(epoch FROM clock_timestamp())::float8 AS at_s,
       pg_wal_lsn_diff(pg_current_wal_lsn(), redo_lsn)::bigint AS since_checkpoint,
       pg_size_bytes(current_setting('max_wal_size')) AS max_wal_size
FROM pg_control_checkpoint();

-- name: requested_checkpoints
-- purpose: Checkpoints that were forced early by max_wal_size.
SELECT num_requested AS requested FROM pg_stat_checkpointer;

-- name: requested_checkpoints_before_17
-- purpose: The same for PostgreSQL 16 and older.
SELECT checkpoints_req AS requested FROM pg_stat_bgwriter;

-- name: archiver
-- purpose: Whether WAL is archived, and whether the last try failed.
SELECT current_setting('archive_mode') AS mode, last_failed_wal,
       last_failed_time > coalesce(last_archived_time, '-infinity') AS failing
FROM pg_stat_archiver;

-- name: archiver_backlog
-- purpose: WAL files that wait for the archiver.
SELECT count(*) AS files FROM pg_ls_archive_statusdir() WHERE name LIKE '%%.ready';

-- name: autovacuum
-- purpose: Autovacuum at work on the table or its partitions.
SELECT v.pid, v.phase, v.relid::regclass::text AS relation
FROM pg_stat_progress_vacuum v JOIN pg_stat_activity a USING (pid)
WHERE a.backend_type = 'autovacuum worker'
  AND (v.relid = to_regclass(%(table)s) OR v.relid IN (SELECT relid FROM pg_partition_tree(to_regclass(%(table)s))))
LIMIT 1;

-- name: blocked
-- purpose: The session that waits longest for one of the backfill's workers.
SELECT a.pid, a.usename::text AS role, a.application_name AS application,
       extract(epoch FROM clock_timestamp() - a.query_start)::float8 * 1000 AS ms
FROM pg_stat_activity a
WHERE a.wait_event_type = 'Lock' AND a.pid <> ALL (%(pids)s) AND pg_blocking_pids(a.pid) && %(pids)s::int[]
ORDER BY a.query_start LIMIT 1;

-- name: snapshot
-- purpose: The oldest transaction of this database that holds back vacuum.
SELECT who, age_s FROM (
    SELECT format('pid %%s (%%s, %%s, %%s)', a.pid, a.usename, coalesce(nullif(a.application_name, ''), 'no name'),
                  a.state) AS who, extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS age_s
    FROM pg_stat_activity a
    WHERE a.datname = current_database() AND a.pid <> ALL (%(pids)s) AND a.pid <> pg_backend_pid()
      AND a.backend_xmin IS NOT NULL AND a.backend_type = 'client backend'
    UNION ALL
    SELECT format('prepared transaction %%s', p.gid), extract(epoch FROM clock_timestamp() - p.prepared)::float8
    FROM pg_prepared_xacts p WHERE p.database = current_database()
) old ORDER BY age_s DESC LIMIT 1;
