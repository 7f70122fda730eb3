-- Reads only: what the role may do.

-- name: rights
-- purpose: What this role may do to the table, in its schema, in the ledger's, and with pgvector.
SELECT has_schema_privilege(quote_ident(%(schema)s)::regnamespace, 'CREATE') AS may_create_in_schema,
    has_schema_privilege(quote_ident(%(schema)s)::regnamespace, 'USAGE') AS may_use_schema,
    quote_ident(%(ledger)s) AS quoted_ledger, l.oid IS NOT NULL AS ledger_there,
    CASE WHEN l.oid IS NULL THEN has_database_privilege(current_database(), 'CREATE')
         ELSE has_schema_privilege(l.oid, 'CREATE') AND has_schema_privilege(l.oid, 'USAGE') END AS may_make_ledger,
    CASE WHEN l.oid IS NULL OR NOT has_schema_privilege(l.oid, 'USAGE') OR e.oid IS NULL THEN true
         ELSE pg_has_role(session_user, e.relowner, 'MEMBER') END AS may_write_ledger,
    ARRAY(SELECT quote_ident(r.rolname) FROM pg_roles r
          WHERE r.rolname = ANY (%(grant_to)s) AND l.oid IS NOT NULL AND NOT has_schema_privilege(r.oid, l.oid, 'USAGE')
            AND NOT has_schema_privilege(l.oid, 'USAGE WITH GRANT OPTION') ORDER BY 1) AS without_ledger,
    ARRAY(SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
          WHERE e.extname = 'vector' AND NOT has_schema_privilege(n.oid, 'USAGE')) AS hidden_extension_schemas,
    has_database_privilege(current_database(), 'TEMPORARY') AS may_make_temporary_tables
FROM (SELECT to_regnamespace(quote_ident(%(ledger)s))::oid AS oid) AS l
LEFT JOIN pg_class e ON e.relnamespace = l.oid AND e.relname = 'entry';
