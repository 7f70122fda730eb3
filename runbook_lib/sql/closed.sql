-- Only the owner may use what the runbook makes, whatever ALTER DEFAULT PRIVILEGES says about new objects.

-- name: there
-- purpose: Of these tables, sequences, functions and schemas, those that are there.
SELECT 'relations' AS kind, c.oid::bigint AS oid
FROM unnest(%(relations)s::text[]) AS n (name) JOIN pg_catalog.pg_class c ON c.oid = pg_catalog.to_regclass(n.name)
UNION ALL
SELECT 'functions', p.oid::bigint
FROM unnest(%(functions)s::text[]) AS n (name),
     pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace s ON s.oid = p.pronamespace
WHERE ARRAY[s.nspname, p.proname]::text[] = pg_catalog.parse_ident(n.name)
UNION ALL
SELECT 'schemas', s.oid::bigint
FROM unnest(%(schemas)s::text[]) AS n (name)
JOIN pg_catalog.pg_namespace s ON s.oid = pg_catalog.to_regnamespace(n.name);

-- name: revokes
-- purpose: Statements that revoke every privilege on these objects, and on their columns' sequences, from all but the owner.
-- Each catalogue has numbers of its own: what is a table's in one may be a function's in another.
WITH made AS (
    SELECT 'SCHEMA' AS kind, pg_catalog.quote_ident(s.nspname) AS name, s.nspowner AS owner,
           coalesce(s.nspacl, pg_catalog.acldefault('n', s.nspowner)) AS acl
    FROM pg_catalog.pg_namespace s WHERE s.oid = ANY (%(schemas)s::oid[])
    UNION ALL
    SELECT 'FUNCTION', p.oid::pg_catalog.regprocedure::text, p.proowner,
           coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))
    FROM pg_catalog.pg_proc p WHERE p.oid = ANY (%(functions)s::oid[])
    UNION ALL
    SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.oid::pg_catalog.regclass::text, c.relowner,
           c.relacl
    FROM pg_catalog.pg_class c
    WHERE c.oid = ANY (%(relations)s::oid[]) OR c.relkind = 'S' AND c.oid IN (
        SELECT d.objid FROM pg_catalog.pg_depend d
        WHERE d.refobjid = ANY (%(relations)s::oid[]) AND d.refclassid = 'pg_class'::pg_catalog.regclass
          AND d.classid = 'pg_class'::pg_catalog.regclass AND d.deptype IN ('a', 'i'))
)
SELECT DISTINCT pg_catalog.format('REVOKE ALL ON %%s %%s FROM %%s', m.kind, m.name,
        CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END
    ) AS statement
FROM made m, pg_catalog.aclexplode(m.acl) a WHERE a.grantee <> m.owner ORDER BY 1;
