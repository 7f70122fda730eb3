-- Does the plan fit? Memory, shared memory, disk and WAL of the server, as far as they can be seen. Reads only.

-- name: places
-- purpose: The session's process and the server's data directory; NULL where this role may not see it.
SELECT pg_backend_pid() AS pid, current_database()::text AS database,
       CASE WHEN pg_has_role('pg_read_all_settings', 'USAGE') THEN current_setting('data_directory') END AS data_directory,
       nullif(pg_tablespace_location(
           coalesce(nullif(c.reltablespace, 0), (SELECT d.dattablespace FROM pg_database d
                                                 WHERE d.datname = current_database()))), '') AS tablespace
FROM (SELECT to_regclass(%(table)s)::oid AS oid) t JOIN pg_class c ON c.oid = t.oid;

-- name: limits
-- purpose: Settings that limit WAL and shared memory; sizes in bytes, -1 for no limit.
SELECT current_setting('dynamic_shared_memory_type') AS shared_memory_type,
       pg_size_bytes(current_setting('max_wal_size')) AS max_wal_bytes,
       (SELECT CASE WHEN s.setting::bigint < 0 THEN -1 ELSE s.setting::bigint * 1024 * 1024 END
        FROM pg_settings s WHERE s.name = 'max_slot_wal_keep_size') AS slot_keeps_bytes;

-- name: slots
-- purpose: Replication slots and the WAL that each keeps from being removed.
SELECT s.slot_name::text AS name, s.active, s.wal_status,
    pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::bigint AS kept_bytes
FROM pg_replication_slots s WHERE NOT s.temporary ORDER BY 1;
