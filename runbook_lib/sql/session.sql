-- What every session of the runbook begins with. Whoever may create in a schema of the path can shadow an inexact call,
-- so what runs before the path is ours is written exactly, types and all.

-- name: inherited
-- purpose: The search path that the server and the role gave this session; its timeout ends with this statement.
SELECT pg_catalog.current_setting('search_path'::pg_catalog.text) AS path,
       pg_catalog.current_schemas(false)::pg_catalog.text[] AS schemas,
       pg_catalog.set_config('statement_timeout'::pg_catalog.text, '0'::pg_catalog.text, false) AS timeout;

-- name: pid
-- purpose: The server process that answers this transaction.
SELECT pg_catalog.pg_backend_pid() AS pid;

-- name: process
-- purpose: The server process that answers this transaction, and the number of this one among its transactions.
SELECT l.pid, pg_catalog.split_part(l.virtualtransaction, '/'::pg_catalog.text, 2)::pg_catalog.int8 AS number
FROM pg_catalog.pg_locks l
WHERE l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()
  AND l.locktype OPERATOR(pg_catalog.=) 'virtualxid'::pg_catalog.text;

-- name: take_path
-- purpose: Set the runbook's search path for this session, and remember the one that it began with.
SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false),
       pg_catalog.set_config('runbook.users_path', %(path)s, false),
       pg_catalog.set_config('runbook.users_schemas', %(schemas)s::pg_catalog.text[]::pg_catalog.text, false),
       pg_catalog.set_config('runbook.target_schema', %(schema)s, false),
       pg_catalog.set_config('runbook.target_table', %(table)s, false);

-- name: set
-- purpose: Set the values that the runbook relies on, except for settings that this server does not know.
SELECT set_config(s.name, w.value, false)
FROM unnest(%(names)s::text[], %(values)s::text[]) AS w (name, value) JOIN pg_settings s ON s.name = w.name;

-- name: privileged
-- purpose: Settings that differ from what the runbook needs, and that only a superuser may change.
SELECT s.name, w.value
FROM unnest(%(names)s::text[], %(values)s::text[]) AS w (name, value) JOIN pg_settings s ON s.name = w.name
WHERE s.setting IS DISTINCT FROM w.value;

-- name: reset_of_pgvector
-- purpose: Set pgvector's settings to their built-in defaults; the search function has its own.
SELECT set_config(name, boot_val, false) FROM pg_settings
WHERE (name LIKE 'hnsw.%%' OR name LIKE 'ivfflat.%%') AND setting IS DISTINCT FROM boot_val;

-- name: path
-- purpose: Those schemas of the session's original path, and pgvector's, in which no other role can shadow a name.
WITH wanted (name, place) AS (
    SELECT * FROM unnest(current_setting('runbook.users_schemas')::text[]) WITH ORDINALITY
    UNION ALL
    SELECT n.nspname::text, 1000000 FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
    WHERE e.extname = 'vector'
)
SELECT concat_ws(', ', 'pg_catalog', string_agg(quote_ident(name), ', ' ORDER BY place), 'pg_temp') AS path
FROM (
    SELECT name, min(place) AS place FROM wanted
    WHERE name NOT IN ('pg_catalog', 'pg_temp') AND name <> ALL (%(open)s::text[]) GROUP BY name
) kept;

-- name: use_path
-- purpose: Use this search path from now on; qualified, since it also ends the use of the application's path.
SELECT pg_catalog.set_config('search_path'::pg_catalog.text, %(path)s::pg_catalog.text, false);

-- name: fixed_path
-- purpose: Make the catalogue spell every name with its schema, until this transaction ends.
SELECT set_config('search_path', 'pg_catalog, pg_temp', true);

-- name: users_path
-- purpose: The search path that the session began with, for the application's own query.
SELECT current_setting('runbook.users_path') AS path, current_setting('runbook.users_schemas')::text[] AS schemas,
       current_setting('search_path') AS own;

-- name: open_schemas
-- purpose: Schemas in use in which others may create, or have created, objects that an unqualified call would find.
-- Trusted are superusers, this role, and the owners of database and table, whose triggers run with our rights anyway.
-- A function counts where it has the name of one of PostgreSQL's own: no other is found in its place.
WITH trusted (oid) AS (
    SELECT oid FROM pg_roles WHERE rolsuper OR rolname IN (current_user, session_user)
    UNION SELECT datdba FROM pg_database WHERE datname = current_database()
    UNION SELECT c.relowner FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = current_setting('runbook.target_schema') AND c.relname = current_setting('runbook.target_table')
), wanted (name) AS (
    SELECT unnest(current_setting('runbook.users_schemas')::text[])
    UNION SELECT current_setting('runbook.target_schema')
    UNION SELECT n.nspname::text FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
    WHERE e.extname = 'vector'
), looked AS (
    SELECT n.oid, n.nspname::text AS schema,
        ARRAY(
            SELECT DISTINCT r.rolname::text
            FROM aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
            JOIN pg_roles r ON r.rolcanlogin AND (a.grantee = 0 OR pg_has_role(r.oid, a.grantee, 'MEMBER'))
            WHERE a.privilege_type = 'CREATE'
              AND NOT EXISTS (SELECT FROM trusted t WHERE pg_has_role(r.oid, t.oid, 'MEMBER'))
            ORDER BY 1
        ) AS creators,
        ARRAY(
            SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END
            FROM aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
            WHERE a.privilege_type = 'CREATE' AND a.grantee <> n.nspowner
              AND NOT EXISTS (SELECT FROM trusted t WHERE a.grantee <> 0 AND pg_has_role(a.grantee, t.oid, 'MEMBER'))
            ORDER BY 1
        ) AS grantees,
        ARRAY(
            SELECT format('function %%s of %%s', p.oid::regprocedure, pg_get_userbyid(p.proowner)) FROM pg_proc p
            WHERE p.pronamespace = n.oid AND p.proowner NOT IN (SELECT oid FROM trusted)
              AND EXISTS (SELECT FROM pg_proc own WHERE own.proname = p.proname AND own.pronamespace = 'pg_catalog'::regnamespace)
            UNION ALL
            SELECT format('operator %%s of %%s', o.oid::regoperator, pg_get_userbyid(o.oprowner)) FROM pg_operator o
            WHERE o.oprnamespace = n.oid AND o.oprowner NOT IN (SELECT oid FROM trusted)
            ORDER BY 1
        ) AS planted
    FROM pg_namespace n WHERE n.nspname IN (SELECT name FROM wanted) AND n.nspname NOT IN ('pg_catalog', 'pg_temp')
)
SELECT schema, quote_ident(schema) AS quoted, creators, grantees, planted FROM looked
WHERE cardinality(creators) > 0 OR cardinality(planted) > 0 ORDER BY schema;

-- name: library
-- purpose: The schema of pgvector's types, needed to load its library, and whether this role may use it.
SELECT n.nspname::text AS schema, has_schema_privilege(n.oid, 'USAGE') AS usable, quote_ident(n.nspname) AS quoted,
       quote_ident(current_user) AS role
FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector';

-- name: types
-- purpose: The types of pgvector, in their schema, and PostgreSQL's bit, with their arrays.
SELECT t.typname::text AS name, t.oid, t.typarray AS array_oid FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
WHERE (n.nspname = %(schema)s AND t.typname IN ('vector', 'halfvec', 'sparsevec'))
   OR (n.nspname = 'pg_catalog' AND t.typname = 'bit');

-- name: load_library
-- purpose: Load pgvector's library: before that its settings are unknown, and only a superuser may write an unknown one.
SELECT '[1]'::{vector_in_schema};

-- name: settings
-- purpose: This session's settings.
SELECT name, setting FROM pg_settings WHERE name = ANY (%(names)s) ORDER BY name;

-- name: application_settings
-- purpose: Settings that sessions of the application begin with: of its roles, where they are named; else of this role,
-- of every other that reads the table where its own query is searched with, and of the database for all the rest.
WITH who (oid) AS (
    SELECT oid FROM pg_roles WHERE rolname = ANY (%(roles)s::text[])
    UNION ALL
    SELECT r.oid FROM pg_roles r
    WHERE cardinality(%(roles)s::text[]) = 0
      AND (r.rolname IN (session_user, current_user) OR (%(readers)s AND r.rolcanlogin AND NOT r.rolsuper
           AND has_table_privilege(r.oid, to_regclass(%(table)s)::oid, 'SELECT')))
    UNION ALL
    SELECT 0::oid WHERE cardinality(%(roles)s::text[]) = 0
), ranked AS (
    SELECT split_part(c.line, '=', 1) AS name, substr(c.line, strpos(c.line, '=') + 1) AS value, s.setrole, s.setdatabase,
           rank() OVER (PARTITION BY w.oid, split_part(c.line, '=', 1) ORDER BY s.setrole = 0, s.setdatabase = 0) AS place
    FROM who w JOIN pg_db_role_setting s ON s.setrole IN (0, w.oid)
    CROSS JOIN LATERAL unnest(s.setconfig) AS c (line)
    WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
)
SELECT DISTINCT name, value,
       concat_ws(' IN DATABASE ',
           CASE WHEN setrole <> 0 THEN 'ROLE ' || quote_ident(pg_get_userbyid(setrole))
                WHEN setdatabase = 0 THEN 'ROLE ALL' END,
           CASE WHEN setdatabase <> 0 AND setrole = 0 THEN 'DATABASE ' || quote_ident(current_database())
                WHEN setdatabase <> 0 THEN quote_ident(current_database()) END) AS owner
FROM ranked WHERE place = 1 ORDER BY 1, 3;

-- name: key_types
-- purpose: The types of the key's columns, in their order, without lengths, to which a cast would cut a longer key.
SELECT format_type(a.atttypid, -1) AS type FROM unnest(%(columns)s::name[]) WITH ORDINALITY AS k (name, place)
JOIN pg_attribute a ON a.attname = k.name
WHERE a.attrelid = to_regclass(%(table)s) AND NOT a.attisdropped ORDER BY k.place;
