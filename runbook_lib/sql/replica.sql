-- A streaming replica to measure on. Everything here only reads.

-- name: written
-- purpose: On the primary: how far its WAL is written.
SELECT pg_current_wal_lsn()::text AS lsn;

-- name: replayed
-- purpose: On the replica: has it replayed that far, and if not, how far behind is it, and is it making progress?
SELECT standby, CASE WHEN standby THEN pg_last_wal_replay_lsn()::text END AS lsn,
       NOT standby OR pg_last_wal_replay_lsn() >= %(lsn)s::pg_lsn AS level,
       CASE WHEN standby THEN greatest(pg_wal_lsn_diff(%(lsn)s::pg_lsn, pg_last_wal_replay_lsn()), 0) ELSE 0 END::bigint
           AS behind_bytes,
       CASE WHEN standby AND pg_last_wal_replay_lsn() < %(lsn)s::pg_lsn
           THEN extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) END::float8 AS behind_s,
       CASE WHEN standby THEN pg_is_wal_replay_paused() ELSE false END AS paused
FROM (SELECT pg_is_in_recovery() AS standby) AS here;

-- name: identity
-- purpose: Which database this is, and whether its server is a standby.
SELECT pg_is_in_recovery() AS standby, d.datname::text AS database, d.oid::bigint AS oid,
       coalesce(host(inet_server_addr()) || ':' || inet_server_port(), 'a local socket') AS address
FROM pg_database d WHERE d.datname = current_database();

-- name: system
-- purpose: The system identifier, which a server shares only with its standbys.
SELECT system_identifier::text AS number FROM pg_control_system();

-- name: pgvector
-- purpose: The versions of pgvector offered and installed, and whether the loaded library knows iterative scans.
SELECT (SELECT default_version FROM pg_available_extensions WHERE name = 'vector') AS offered,
       (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS installed,
       current_setting('hnsw.iterative_scan', true) IS NOT NULL AS knows_settings;

-- name: patience
-- purpose: How long a scan may delay replay, and how many were cancelled for it so far.
SELECT current_setting('hot_standby_feedback') = 'on' AS feedback,
       (SELECT setting::bigint FROM pg_settings WHERE name = 'max_standby_streaming_delay') AS delay_ms,
       (SELECT confl_tablespace + confl_lock + confl_snapshot + confl_bufferpin + confl_deadlock
        FROM pg_stat_database_conflicts WHERE datname = current_database()) AS cancelled;

-- name: planner
-- purpose: What the planner's choices depend on: cost settings, switches, relation sizes and cache size.
SELECT name, current_setting(name) AS value, name ~ '^(enable_.*|jit|.*_cost)$' AS is_price
FROM pg_settings
WHERE name ~ '^(enable_.*|jit|.*_cost)$'
   OR name IN ('shared_buffers', 'effective_cache_size', 'work_mem', 'max_parallel_workers_per_gather')
ORDER BY is_price DESC, name;
