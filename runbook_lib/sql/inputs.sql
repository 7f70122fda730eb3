-- Reads only: what the parameters name, compared with what the server has.

-- name: server
-- purpose: Role, and whether this server takes writes at all.
SELECT current_user AS role, current_database() AS database, quote_ident(current_database()) AS quoted_database,
    quote_ident(current_user) AS quoted_role, pg_is_in_recovery() AS in_recovery,
    -- As the session began: its own setting is the fence of runbook_lib/core/cell_order.py.
    (SELECT reset_val::boolean FROM pg_settings WHERE name = 'default_transaction_read_only') AS read_only,
    (SELECT r.rolsuper FROM pg_roles r WHERE r.rolname = current_user) AS superuser,
    ARRAY(SELECT r.rolname::text FROM pg_roles r
          WHERE r.rolname = ANY (%(administrators)s) AND pg_has_role(r.oid, 'USAGE')) AS administrator_of;

-- name: table
-- purpose: The relation by that name, of whatever kind, and who owns it.
SELECT c.oid::bigint AS oid, c.relkind::text AS kind, quote_ident(pg_get_userbyid(c.relowner)) AS owner,
    pg_has_role(c.relowner, 'USAGE') AS owned, has_table_privilege(c.oid, 'SELECT') AS readable,
    CASE WHEN c.relispartition THEN pg_partition_root(c.oid)::regclass::text END AS root
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relname = %(table)s AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'i', 'I', 'c');

-- name: tables
-- purpose: The names of all tables that could have been meant.
SELECT n.nspname::text AS schema, c.relname::text AS table
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'
ORDER BY 1, 2;

-- name: columns
-- purpose: The table's columns with their types.
SELECT a.attname::text AS name, format_type(a.atttypid, NULL) AS type, a.attnotnull AS not_null,
    t.typcategory = 'S' AS is_text
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum;

-- name: columns_of
-- purpose: The names of a table's columns.
SELECT a.attname::text AS name FROM pg_catalog.pg_attribute a
WHERE a.attrelid = pg_catalog.to_regclass(%(table)s) AND a.attnum > 0 AND NOT a.attisdropped;

-- name: unique_key
-- purpose: The valid, complete unique indexes on the columns of the key alone, in their order.
SELECT i.indexrelid::regclass::text AS index
FROM pg_index i
WHERE i.indrelid = %(oid)s AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL
  AND i.indexprs IS NULL AND i.indnkeyatts = cardinality(%(columns)s::text[]) AND ARRAY(
      SELECT a.attname::text FROM generate_series(0, i.indnkeyatts - 1) AS place
      JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[place] ORDER BY place
  ) = %(columns)s::text[];

-- name: functions_of_others
-- purpose: Functions of this name whose owner could not change the table.
SELECT format('%%I.%%I(%%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) AS function,
       pg_get_userbyid(p.proowner)::text AS owner
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(name)s AND NOT {of_trusted_owner} ORDER BY 1;

-- name: made_by_runbook
-- purpose: Did the runbook make this for the target, by that statement, without removing it since?
SELECT coalesce(max(seq) FILTER (WHERE kind = 'statement' AND body->>'name' = %(made)s OR kind = 'owns'), 0)
     > coalesce(max(seq) FILTER (WHERE (kind = 'statement' AND body->>'name' = %(dropped)s)
        OR (kind = 'phase' AND phase = '30_expand_schema' AND body->>'verdict' = 'UNDONE')), 0) AS made
FROM {counted} e WHERE target = {target_name};

-- name: unknown_roles
-- purpose: Roles that the parameters name and that do not exist.
SELECT wanted AS role FROM unnest(%(roles)s::text[]) wanted
WHERE NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = wanted);
