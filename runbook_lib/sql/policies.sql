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
