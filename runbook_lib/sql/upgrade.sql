-- From one release of pgvector to a newer one, without new embeddings.

-- name: loaded
-- purpose: The release of the library that this session has loaded, as the library reports it; PostgreSQL 18.
SELECT version FROM pg_get_loaded_modules() WHERE module_name = 'vector';

-- name: may_look_at_files
-- purpose: May this role see when the server's files changed, and which grants would allow it?
SELECT has_function_privilege('pg_config()', 'EXECUTE')
       AND has_function_privilege('pg_stat_file(text, boolean)', 'EXECUTE') AS may, quote_ident(current_user) AS role;

-- name: library_file
-- purpose: When the library's file was put in place, to the second; its modification time may be older, from the package.
SELECT greatest(f.modification, f.change) AS changed_at
FROM pg_config() AS c, pg_stat_file(c.setting || '/vector.so', true) AS f
WHERE c.name = 'PKGLIBDIR' AND f.modification IS NOT NULL;

-- name: older_sessions
-- purpose: Sessions of this database that began before a time, or with a start time hidden from this role.
SELECT a.pid, a.usename::text AS role, a.application_name AS application, a.backend_start AS began
FROM pg_stat_activity a
WHERE a.datname = current_database() AND coalesce(a.backend_type, 'client backend') = 'client backend'
  AND a.pid <> pg_backend_pid()
  AND (a.backend_start IS NULL OR a.backend_start < coalesce(%(changed_at)s::timestamptz + interval '1 s', (
      SELECT own.backend_start FROM pg_stat_activity own WHERE own.pid = pg_backend_pid())))
ORDER BY a.backend_start NULLS FIRST;

-- name: vacuums
-- purpose: How often the relation that holds the vectors, or a partition of it, was vacuumed, and since when it counts.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(vectors)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT coalesce(sum(s.vacuum_count + s.autovacuum_count), 0)::bigint AS vacuums,
       (SELECT d.stats_reset FROM pg_stat_database d WHERE d.datname = current_database()) AS counted_since
FROM pg_stat_all_tables s WHERE s.relid IN (SELECT oid FROM part);
