-- Who may do what to the runbook's own objects: the privileges that stand, whoever has granted them.

-- name: open
-- purpose: Every privilege on them of a role that is neither a superuser nor a member of the owner; NULL is PUBLIC.
WITH relation AS (
    SELECT c.oid, c.relname, c.relkind, c.relowner, c.relacl FROM pg_class c
    WHERE c.relnamespace = to_regnamespace(%(ledger)s) AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
       OR c.oid = to_regclass(%(vectors)s)
       OR c.oid IN (SELECT t.relid FROM pg_partition_tree(to_regclass(%(parts)s)) t)
), object AS (
    SELECT 'SCHEMA' AS kind, quote_ident(n.nspname) AS name, 'schema' AS what, n.nspowner AS owner,
           coalesce(n.nspacl, acldefault('n', n.nspowner)) AS acl, '' AS of_column
    FROM pg_namespace n WHERE n.oid = to_regnamespace(%(ledger)s)
    UNION ALL
    SELECT 'FUNCTION', p.oid::regprocedure::text,
           CASE WHEN p.proname = ANY (%(functions)s) THEN 'search' ELSE p.proname::text END,
           p.proowner, coalesce(p.proacl, acldefault('f', p.proowner)), ''
    FROM pg_proc p WHERE p.pronamespace = to_regnamespace(%(ledger)s)
       OR p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = ANY (%(functions)s)
    UNION ALL
    SELECT CASE r.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, r.oid::regclass::text,
           CASE r.oid WHEN to_regclass(%(vectors)s) THEN 'vectors' WHEN to_regclass(%(log)s) THEN 'log'
               ELSE r.relname::text END, r.relowner, r.relacl, ''
    FROM relation r
    UNION ALL
    SELECT 'TABLE', r.oid::regclass::text, CASE r.oid WHEN to_regclass(%(log)s) THEN 'log' ELSE r.relname::text END,
           r.relowner, a.attacl, quote_ident(a.attname)
    FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
), granted AS (
    SELECT o.kind, o.name, o.what, o.of_column, o.owner, a.grantee, a.privilege_type AS privilege
    FROM object o, aclexplode(o.acl) a
    UNION
    -- What these roles of PostgreSQL 14 give to their members stands in no list of privileges. Who may read all tables
    -- is meant to, but for the rows that policies keep back.
    SELECT 'ROLE', d.rolname, d.rolname, '', 0::oid, m.oid, 'MEMBER'
    FROM pg_roles d JOIN pg_roles m ON m.rolname = ANY (%(callers)s) AND pg_has_role(m.oid, d.oid, 'MEMBER')
    WHERE d.rolname = 'pg_write_all_data' OR d.rolname = 'pg_read_all_data' AND EXISTS (
        SELECT FROM pg_class c WHERE c.oid = to_regclass(%(table)s) AND c.relrowsecurity)
)
SELECT g.kind, g.name, g.what, g.of_column, g.privilege, quote_ident(r.rolname) AS grantee,
    coalesce(has_table_privilege(r.oid, to_regclass(%(table)s), 'SELECT'), EXISTS (
        SELECT FROM pg_class c, aclexplode(c.relacl) a
        WHERE c.oid = to_regclass(%(table)s) AND a.grantee = 0 AND a.privilege_type = 'SELECT')) AS reads_table,
    r.oid IS NULL OR EXISTS (
        SELECT FROM pg_roles m WHERE m.rolname = ANY (%(callers)s) AND pg_has_role(m.oid, r.oid, 'MEMBER')) AS is_caller
FROM granted g LEFT JOIN pg_roles r ON r.oid = g.grantee
WHERE g.grantee <> g.owner
  AND (g.grantee = 0 OR NOT r.rolsuper AND (g.owner = 0 OR NOT pg_has_role(r.oid, g.owner, 'MEMBER')))
ORDER BY 1, 2, 4, 6 NULLS FIRST, 5;

-- name: by_default
-- purpose: What ALTER DEFAULT PRIVILEGES gives to others on all that this role makes, in any schema or in these.
SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS grantee,
    string_agg(DISTINCT CASE d.defaclobjtype WHEN 'r' THEN 'tables' WHEN 'S' THEN 'sequences' WHEN 'f' THEN 'functions'
                        ELSE 'schemas' END, ', ') AS made
FROM pg_default_acl d, aclexplode(d.defaclacl) a
WHERE pg_get_userbyid(d.defaclrole) = current_user AND a.grantee <> d.defaclrole
  AND d.defaclobjtype IN ('r', 'S', 'f', 'n')
  -- Calls by PUBLIC are PostgreSQL's own default, which stands in each list that somebody has changed.
  AND NOT (a.grantee = 0 AND d.defaclobjtype = 'f' AND d.defaclnamespace = 0)
  AND d.defaclnamespace IN (0, to_regnamespace(%(ledger)s)::oid, to_regnamespace(%(schema)s)::oid)
GROUP BY a.grantee ORDER BY 1;
