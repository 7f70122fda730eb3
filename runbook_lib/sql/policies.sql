-- Row level security of the table: does it hold wherever the runbook keeps something of its rows?

-- name: security
-- purpose: Whether policies are on for the table or a partition of it, and whether they keep rows from this role.
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
-- purpose: Of these roles, those from which the table's policies may keep rows.
SELECT r.rolname::text AS role FROM pg_class c JOIN pg_roles r ON r.rolname = ANY (%(roles)s)
WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relname = %(table)s AND c.relrowsecurity
  AND NOT r.rolsuper AND NOT r.rolbypassrls
  AND (c.relforcerowsecurity OR NOT pg_has_role(r.oid, c.relowner, 'USAGE'))
ORDER BY 1;

-- name: set
-- purpose: A setting that the policies read, or the role itself, for this transaction.
SELECT set_config(%(name)s, %(value)s, true);

-- name: not_in_both
-- purpose: Privileges and policies that the table or the ordinary one kept beside it has, and the other lacks.
WITH relation AS (
    SELECT c.oid, c.relname, c.relowner, c.relacl, c.relrowsecurity, c.relforcerowsecurity,
           quote_ident(c.relname) || '.' AS prefix
    FROM pg_class c
    WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relname IN (%(table)s, %(whole)s)
      AND EXISTS (SELECT FROM pg_class m WHERE m.relnamespace = to_regnamespace(%(ledger)s) AND m.relname = %(move)s)
      AND EXISTS (SELECT FROM pg_class w WHERE w.relnamespace = c.relnamespace AND w.relname = %(whole)s)
), given AS (
    SELECT r.oid, r.relowner, a.grantee,
           a.privilege_type || CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS privilege
    FROM relation r, aclexplode(r.relacl) a
    UNION ALL
    SELECT r.oid, r.relowner, a.grantee, format('%%s (%%I)', a.privilege_type, c.attname)
    FROM relation r JOIN pg_attribute c ON c.attrelid = r.oid, aclexplode(c.attacl) a
), line AS (
    SELECT r.relname, format('%%s to %%s', g.privilege,
        CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(g.grantee)::text END) AS line
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
SELECT line, min(relname)::text AS relation FROM line GROUP BY line HAVING count(*) = 1 ORDER BY 2, 1;
