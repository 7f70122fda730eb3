-- Another model or dimension: a second column, and one function that answers from either.

-- name: facts
-- purpose: A search function as the catalogue has it, and the roles that may call it, apart from its owner.
SELECT p.oid::bigint AS oid, pg_get_functiondef(p.oid) AS definition, p.prosrc AS source,
       format('CREATE OR REPLACE FUNCTION %%I.%%I(', n.nspname, p.proname) AS head,
       format('CREATE OR REPLACE FUNCTION %%I.%%I(', n.nspname, %(other)s::text) AS other_head,
       pg_get_function_arguments(p.oid) AS arguments, pg_get_function_identity_arguments(p.oid) AS identity,
       pg_get_function_result(p.oid) AS result, p.proargnames[1:p.pronargs] AS passed,
       ARRAY(SELECT CASE WHEN a.grantee = 0 THEN 'public' ELSE pg_get_userbyid(a.grantee)::text END
             FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
             WHERE a.privilege_type = 'EXECUTE' AND a.grantee <> p.proowner ORDER BY 1) AS callers
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s AND {of_trusted_owner}
  -- Includes a user's function of that name; not the overloads, which only convert types.
  AND coalesce({is_called} OR NOT 'answered_by' = ANY (p.proargnames), true)
ORDER BY {is_called} DESC NULLS LAST LIMIT 1;

-- name: callers_without_rights
-- purpose: Roles that may call this function, but not the other one, or not read its vectors.
SELECT r.role FROM unnest(%(callers)s::text[]) AS r (role)
WHERE NOT has_function_privilege(r.role, %(oid)s::oid, 'EXECUTE')
   OR NOT has_column_privilege(r.role, %(vectors)s, %(column)s, 'SELECT');

-- name: swap
-- purpose: Keep the current function under another name, and let its own name answer vectors of either model.
-- lock: none on the target
-- undo: model_change.swap_back
{copy};
-- closed to everybody but its owner
{grants}
CREATE OR REPLACE FUNCTION {function}({arguments}) RETURNS {result}
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $runbook$
-- runbook hand-over from {old_name} to {new_name}: both answer
BEGIN
    {refuse_unknown_setting};
    IF {is_new} THEN
        RETURN QUERY SELECT h.* FROM {new_function}({passed}) AS h;
    ELSIF {vector} IS NULL OR cardinality({vector}) = {old_dimension} THEN
        RETURN QUERY SELECT h.* FROM {before}({passed}) AS h;
    ELSE
        RAISE EXCEPTION USING ERRCODE = 'data_exception',
            MESSAGE = concat('the query vector has ', cardinality({vector}), ' dimensions'), HINT = {hint};
    END IF;
END
$runbook$;

-- name: refuse_unknown_setting
-- purpose: Part of the function if both models have the same dimension: a mistyped setting is an error.
IF coalesce(nullif(current_setting({setting}, true), ''), {old_literal}) NOT IN ({old_literal}, {new_literal}) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = concat({setting}, ' names no model: ', current_setting({setting}, true)), HINT = {hint};
    END IF;

-- name: swap_back
-- purpose: Restore the former function under the name that the application calls, exactly.
-- lock: none on the target
-- undo: model_change.swap
{original};

-- name: drop_before
-- purpose: Drop the copy under the other name, once the calls that may still use it have ended.
-- lock: none on the target
-- undo: model_change.swap
DROP FUNCTION IF EXISTS {before}({identity});

-- name: now
-- purpose: The server's clock.
SELECT clock_timestamp() AS at;

-- name: older_calls
-- purpose: Sessions whose statement began before that; for sessions this role may not look into, any that are active.
SELECT count(DISTINCT l.pid)::int AS calls
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'virtualxid' AND l.mode = 'ExclusiveLock' AND l.pid <> pg_backend_pid()
  AND a.datname = current_database() AND coalesce(a.backend_type, 'client backend') = 'client backend'
  AND coalesce(a.state, 'active') = 'active' AND coalesce(a.query_start < %(since)s, true);
