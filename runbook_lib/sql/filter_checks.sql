-- Conditions from the parameters, checked before anything relies on them. {condition} is a condition on a row t.

-- name: type_of
-- purpose: The type that the parameters name, if it exists and can be that of a value.
SELECT format_type(t.oid, -1) AS type FROM pg_type t WHERE t.oid = to_regtype(%(type)s) AND t.typtype <> 'p';

-- name: plan
-- purpose: Let PostgreSQL plan the condition; no row is read. Only a volatile function keeps the two levels apart.
EXPLAIN (FORMAT JSON) SELECT FROM (SELECT {condition} AS holds FROM {table} t) runbook_probe WHERE holds;

-- name: create_probe
-- purpose: Make a view of the condition, to learn from its dependencies what it reads; in a transaction that is rolled back.
CREATE TEMPORARY VIEW runbook_probe AS SELECT FROM {table} t WHERE {condition};

-- name: create_indexed_probe
-- purpose: Create an empty table with the columns of the target, to try the condition of an index on; rolled back.
CREATE TEMPORARY TABLE runbook_probe_of_index (LIKE {table});

-- name: index_probe
-- purpose: Try the condition of the index on that table; rolled back.
CREATE INDEX ON runbook_probe_of_index ({key}){of_rows};

-- name: lacking
-- purpose: What the view reads or calls that a role may not, each with its GRANT.
WITH read AS (
    SELECT DISTINCT d.refclassid AS class, d.refobjid AS oid, d.refobjsubid AS place
    FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
    WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid <> r.ev_class
      AND r.ev_class = to_regclass('pg_temp.runbook_probe')
), relations AS (
    SELECT c.oid, format('%%I.%%I', n.nspname, c.relname) AS shown, c.relnamespace AS schema, r.place::smallint AS place
    FROM read r JOIN pg_class c ON r.class = 'pg_class'::regclass AND c.oid = r.oid
    JOIN pg_namespace n ON n.oid = c.relnamespace
), functions AS (
    SELECT p.oid, p.oid::regprocedure::text AS shown, p.pronamespace AS schema
    FROM read r JOIN pg_proc p ON r.class = 'pg_proc'::regclass AND p.oid = r.oid
), role AS (
    SELECT oid, rolname::text AS name, quote_ident(rolname) AS shown FROM pg_roles WHERE rolname = ANY (%(roles)s)
)
SELECT DISTINCT role.name AS role, 'SELECT on ' || x.shown AS privilege,
       format('GRANT SELECT ON %%s TO %%s;', x.shown, role.shown) AS granted
FROM role, relations x
WHERE NOT CASE x.place WHEN 0 THEN has_any_column_privilege(role.oid, x.oid, 'SELECT')
                       ELSE has_column_privilege(role.oid, x.oid, x.place, 'SELECT') END
UNION
SELECT role.name, 'EXECUTE on ' || x.shown, format('GRANT EXECUTE ON FUNCTION %%s TO %%s;', x.shown, role.shown)
FROM role, functions x WHERE NOT has_function_privilege(role.oid, x.oid, 'EXECUTE')
UNION
SELECT role.name, 'USAGE on schema ' || quote_ident(n.nspname),
       format('GRANT USAGE ON SCHEMA %%I TO %%s;', n.nspname, role.shown)
FROM role, (SELECT schema FROM relations UNION SELECT schema FROM functions) x JOIN pg_namespace n ON n.oid = x.schema
WHERE NOT has_schema_privilege(role.oid, n.oid, 'USAGE')
ORDER BY 1, 2;
