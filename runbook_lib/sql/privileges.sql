-- Who may do what to the runbook's own objects: the privileges that stand, whoever has granted them.

-- name: open
-- purpose: Every privilege on them held by a role that is neither a superuser nor a member of the owner; NULL is PUBLIC.
-- By the catalogue's own names: to_regclass() wants USAGE on the schema, which may be what this role lacks.
WITH named AS (
    SELECT c.oid, c.relname, c.relacl, c.relrowsecurity FROM pg_class c
    WHERE c.relnamespace = to_regnamespace(%(schema)s)
), target AS (
    SELECT n.* FROM named n WHERE n.relname = %(table)s
), relation AS (
    SELECT c.oid, c.relnamespace, c.relname, c.relkind, c.relowner, c.relacl,
           CASE WHEN c.relname = %(log)s THEN 'log' ELSE c.relname::text END AS what
    FROM pg_class c WHERE c.relnamespace = to_regnamespace(%(ledger)s) AND c.relname = ANY (%(own)s)
    UNION ALL
    SELECT s.oid, s.relnamespace, s.relname, s.relkind, s.relowner, s.relacl, 'sequence'
    FROM pg_class c JOIN pg_depend d ON d.refobjid = c.oid AND d.classid = d.refclassid AND d.deptype IN ('a', 'i')
    JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
    WHERE c.relnamespace = to_regnamespace(%(ledger)s) AND c.relname = ANY (%(own)s)
      AND d.classid = 'pg_class'::regclass
    UNION ALL
    SELECT c.oid, c.relnamespace, c.relname, c.relkind, c.relowner, c.relacl,
           CASE WHEN n.relname = %(vectors)s THEN 'vectors' ELSE 'copy' END
    FROM named n JOIN pg_class c ON c.oid = n.oid OR c.oid IN (SELECT t.relid FROM pg_partition_tree(n.oid::regclass) t)
    WHERE n.relname IN (%(vectors)s, %(parts)s)
), object AS (
    SELECT 'SCHEMA' AS kind, quote_ident(n.nspname) AS name, 'schema' AS what, n.nspowner AS owner,
           coalesce(n.nspacl, acldefault('n', n.nspowner)) AS acl, '' AS of_column
    FROM pg_namespace n WHERE n.oid = to_regnamespace(%(ledger)s)
    UNION ALL
    SELECT 'FUNCTION', format('%%I.%%I(%%s)', n.nspname, p.proname, oidvectortypes(p.proargtypes)),
           CASE WHEN p.proname = ANY (%(functions)s) THEN 'search' ELSE p.proname::text END,
           p.proowner, coalesce(p.proacl, acldefault('f', p.proowner)), ''
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE p.pronamespace = to_regnamespace(%(ledger)s) AND p.proname = ANY (%(own)s)
       OR p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = ANY (%(functions)s)
    UNION ALL
    SELECT CASE r.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, format('%%I.%%I', n.nspname, r.relname), r.what,
           r.relowner, r.relacl, ''
    FROM relation r JOIN pg_namespace n ON n.oid = r.relnamespace
    UNION ALL
    SELECT 'TABLE', format('%%I.%%I', n.nspname, r.relname), r.what, r.relowner, a.attacl, quote_ident(a.attname)
    FROM relation r JOIN pg_namespace n ON n.oid = r.relnamespace
    JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
), granted AS (
    SELECT o.kind, o.name, o.what, o.of_column, o.owner, a.grantee, a.privilege_type AS privilege
    FROM object o, aclexplode(o.acl) a
    UNION
    -- What these roles of PostgreSQL 14 give to their members stands in no list of privileges. Who may read all tables
    -- is meant to, but for the rows that policies keep back.
    SELECT 'ROLE', d.rolname, d.rolname, '', 0::oid, m.oid, 'MEMBER'
    FROM pg_roles d JOIN pg_roles m ON m.rolname = ANY (%(callers)s) AND pg_has_role(m.oid, d.oid, 'MEMBER')
    WHERE d.rolname = 'pg_write_all_data'
       OR d.rolname = 'pg_read_all_data' AND EXISTS (SELECT FROM target t WHERE t.relrowsecurity)
)
SELECT g.kind, g.name, g.what, g.of_column, g.privilege, quote_ident(r.rolname) AS grantee,
    EXISTS (SELECT FROM target t, aclexplode(t.relacl) a WHERE a.privilege_type = 'SELECT'
            AND (a.grantee = 0 OR r.oid IS NOT NULL AND pg_has_role(r.oid, a.grantee, 'USAGE'))) AS reads_table,
    r.oid IS NULL OR EXISTS (
        SELECT FROM pg_roles m
        WHERE m.rolname = ANY (%(callers)s) AND NOT m.rolsuper AND pg_has_role(m.oid, r.oid, 'MEMBER')) AS is_caller
FROM granted g LEFT JOIN pg_roles r ON r.oid = g.grantee
WHERE g.grantee <> g.owner AND r.rolname IS DISTINCT FROM current_user
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
