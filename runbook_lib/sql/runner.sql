-- Sessions of a run, found by the application name that each of its connections carries.

-- name: cancel_statements
-- purpose: Cancel what the run's sessions are doing; how many were at work.
SELECT count(pg_cancel_backend(pid)) AS sessions
FROM pg_stat_activity
WHERE datname = current_database() AND starts_with(application_name, %(prefix)s) AND state <> 'idle'
  AND pid <> pg_backend_pid() AND backend_type = 'client backend';

-- name: end_sessions
-- purpose: End the run's sessions; how many there were.
SELECT count(pg_terminate_backend(pid)) AS sessions
FROM pg_stat_activity
WHERE datname = current_database() AND starts_with(application_name, %(prefix)s)
  AND pid <> pg_backend_pid() AND backend_type = 'client backend';

-- name: is_connected
-- purpose: Is a run's runner still connected?
SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_activity a
               WHERE a.datname = current_database() AND a.application_name = %(name)s) AS connected;

-- name: sessions_of
-- purpose: How many sessions of a run are connected.
SELECT count(*) AS sessions FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND starts_with(application_name, %(prefix)s) AND backend_type = 'client backend';

-- name: first_words
-- purpose: The first text of the rows with these keys; keys is an array literal with elements of the key's type.
SELECT {one t.key}::text AS key, left({text}, 200) AS text
FROM {table} t WHERE {t.key IN %keys};

-- name: timeline
-- purpose: The number of the server's timeline, which grows when a standby is promoted or a backup recovered.
SELECT ('x' || pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8))
    ::pg_catalog.bit(32)::pg_catalog.int4 AS timeline;

-- name: versions
-- purpose: Server and pgvector, as the server says; pgvector is NULL where it is not installed.
SELECT current_setting('server_version') AS postgresql,
       (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS pgvector;
