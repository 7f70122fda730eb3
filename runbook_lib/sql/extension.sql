-- Phase 20: pgvector on the server, installed or updated, and removed only where the runbook brought it.

-- name: offered
-- purpose: The versions of pgvector that this server offers, its default and the installed one.
SELECT
    (SELECT a.default_version FROM pg_available_extensions a WHERE a.name = 'vector') AS default_version,
    (SELECT a.installed_version FROM pg_available_extensions a WHERE a.name = 'vector') AS installed,
    ARRAY(SELECT v.version FROM pg_available_extension_versions v WHERE v.name = 'vector') AS offered,
    coalesce((SELECT bool_or(v.trusted) FROM pg_available_extension_versions v WHERE v.name = 'vector'), false) AS trusted,
    (SELECT pg_has_role(e.extowner, 'USAGE') FROM pg_extension e WHERE e.extname = 'vector') AS owned,
    (SELECT n.nspname::text FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
     WHERE e.extname = 'vector') AS installed_schema,
    to_regnamespace(quote_ident(%(schema)s)) IS NOT NULL AS schema_there,
    has_database_privilege(current_database(), 'CREATE') AS may_create_in_database;

-- name: state
-- purpose: The installed version of pgvector, the server's default, and whether it offers any version.
SELECT
    (SELECT e.extversion FROM pg_extension e WHERE e.extname = 'vector') AS installed,
    (SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector')
        AS installed_schema,
    (SELECT a.default_version FROM pg_available_extensions a WHERE a.name = 'vector') AS default_version;

-- name: create
-- purpose: Install pgvector: its types, operators and index methods.
-- lock: none on the target
-- undo: extension.drop
CREATE EXTENSION vector SCHEMA {extension_schema}{version_clause};

-- name: update
-- purpose: Update the catalogue to the release of the server's library.
-- lock: none on the target
-- undo: none; pgvector has no way down, and its library is the new one either way
ALTER EXTENSION vector UPDATE{version_clause};

-- name: drop
-- purpose: Remove pgvector; PostgreSQL refuses while anything uses it (RESTRICT).
-- lock: none on the target
-- undo: extension.create
DROP EXTENSION vector RESTRICT;

-- name: load_library
-- purpose: Make this session load pgvector's library, so that its settings are known.
SELECT '[1]'::{vector_in_schema};

-- name: library_knows
-- purpose: Does the loaded library itself define this setting? A mistyped one is only a placeholder, not listed here.
SELECT EXISTS (SELECT FROM pg_settings WHERE name = %(setting)s AND vartype = 'enum') AS known;

-- name: installed_by_runbook
-- purpose: Did the runbook install it for this target, without removing it since?
SELECT coalesce(max(seq) FILTER (WHERE body->>'name' = 'extension.create'), 0)
     > coalesce(max(seq) FILTER (WHERE body->>'name' = 'extension.drop'), 0) AS installed
FROM {counted} e WHERE target = {target_name} AND kind = 'statement';

-- name: users
-- purpose: What outside the extension uses its types, operators or functions: columns, functions, indexes.
WITH member AS (
    SELECT d.classid, d.objid FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
    WHERE d.refclassid = 'pg_extension'::regclass AND e.extname = 'vector' AND d.deptype = 'e'
    UNION
    SELECT 'pg_type'::regclass, t.typarray FROM pg_type t JOIN pg_extension e ON e.extname = 'vector'
    JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
        AND d.classid = 'pg_type'::regclass AND d.objid = t.oid
    WHERE t.typarray <> 0
)
SELECT DISTINCT pg_describe_object(d.classid, d.objid, d.objsubid) AS object
FROM pg_depend d JOIN member m ON m.classid = d.refclassid AND m.objid = d.refobjid
WHERE d.deptype IN ('n', 'a')
  AND NOT EXISTS (SELECT FROM member own WHERE own.classid = d.classid AND own.objid = d.objid)
  AND NOT EXISTS (
      SELECT FROM pg_depend inner_part JOIN member own ON own.classid = inner_part.refclassid AND own.objid = inner_part.refobjid
      WHERE inner_part.classid = d.classid AND inner_part.objid = d.objid AND inner_part.deptype = 'i')
ORDER BY object;
