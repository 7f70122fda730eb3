-- Row level security of the table: does it hold wherever the runbook keeps something of its rows?

-- name: security
-- purpose: Whether row security is enabled on the table or a partition of it, and applies to this role.
WITH target AS (
    SELECT c.oid FROM pg_class c WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relname = %(table)s
), part AS (
    SELECT oid FROM target UNION SELECT t.relid FROM target, pg_partition_tree(target.oid::regclass) t
)
SELECT coalesce(bool_or(c.relrowsecurity), false) AS is_on,
    coalesce(bool_or(row_security_active(c.oid)), false) AS for_us,
    coalesce(bool_or(c.relforcerowsecurity), false) AS is_forced, quote_ident(current_user) AS role
FROM part JOIN pg_class c USING (oid);

-- name: subject_to_them
-- purpose: Whether each of these roles exists, and whether the table's policies may hide rows from it.
SELECT w.role, r.oid IS NOT NULL AS exists,
       coalesce(c.relrowsecurity AND NOT r.rolsuper AND NOT r.rolbypassrls
                AND (c.relforcerowsecurity OR NOT pg_has_role(r.oid, c.relowner, 'USAGE')), false) AS is_subject
FROM unnest(%(roles)s::text[]) AS w (role) LEFT JOIN pg_roles r ON r.rolname = w.role
JOIN pg_class c ON c.relnamespace = to_regnamespace(%(schema)s) AND c.relname = %(table)s;

-- name: any_row
-- purpose: Does this session see a row of the table?
SELECT FROM {table} t LIMIT 1;

-- name: not_in_both
-- purpose: Privileges and policies that either the table or the ordinary one kept for a rollback lacks.
WITH relation AS (
    SELECT c.oid, c.relname, c.relowner, c.relacl, c.relrowsecurity, c.relforcerowsecurity,
           quote_ident(c.relname) || '.' AS prefix
    FROM pg_class c
    WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relname IN (%(table)s, %(whole)s)
      AND EXISTS (SELECT FROM pg_class m WHERE m.relnamespace = to_regnamespace(%(ledger)s) AND m.relname = %(move)s)
      AND EXISTS (SELECT FROM pg_class w WHERE w.relnamespace = c.relnamespace AND w.relname = %(whole)s)
), given AS (
    SELECT r.oid, r.relowner, a.grantee, a.is_grantable, a.privilege_type AS privilege
    FROM relation r, aclexplode(r.relacl) a
    UNION ALL
    SELECT r.oid, r.relowner, a.grantee, a.is_grantable, format('%%s (%%I)', a.privilege_type, c.attname)
    FROM relation r JOIN pg_attribute c ON c.attrelid = r.oid, aclexplode(c.attacl) a
), line AS (
    SELECT r.relname, format('%%s to %%s', g.privilege,
        CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(g.grantee)::text END)
        || CASE WHEN g.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS line
    FROM relation r JOIN given g ON g.oid = r.oid WHERE g.grantee <> g.relowner
    UNION ALL
    SELECT r.relname, format('policy %%s', p.polname) || CASE WHEN p.polpermissive THEN '' ELSE ', restrictive' END
        || CASE p.polcmd WHEN 'r' THEN ' FOR SELECT' WHEN 'a' THEN ' FOR INSERT' WHEN 'w' THEN ' FOR UPDATE'
                         WHEN 'd' THEN ' FOR DELETE' ELSE '' END
        || ' TO ' || (SELECT string_agg(CASE o WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(o)::text END, ', ' ORDER BY o)
                      FROM unnest(p.polroles) o)
        || coalesce(' USING ' || replace(pg_get_expr(p.polqual, p.polrelid), r.prefix, ''), '')
        || coalesce(' WITH CHECK ' || replace(pg_get_expr(p.polwithcheck, p.polrelid), r.prefix, ''), '')
    FROM relation r JOIN pg_policy p ON p.polrelid = r.oid
    UNION ALL
    SELECT r.relname, format('row level security: %%s, forced: %%s', r.relrowsecurity, r.relforcerowsecurity)
    FROM relation r
)
-- Two grantors may have given the same: that is one line of one relation.
SELECT line, min(relname)::text AS relation FROM line GROUP BY line HAVING count(DISTINCT relname) = 1 ORDER BY 2, 1;
