-- Where reads go, how to search by which filter, and the functions that the application calls; their texts are in
-- search_function.sql, the searches in them in routes.sql.

-- name: create_route
-- purpose: Create the table that says where reads go; one row moves them.
-- lock: none on the target
-- undo: search.drop_function
CREATE TABLE IF NOT EXISTS {route} (
    target        text PRIMARY KEY,
    route         text NOT NULL CHECK (route IN ('legacy', 'vector', 'hybrid')),
    share_percent integer NOT NULL CHECK (share_percent BETWEEN 0 AND 100),
    changed_at    timestamptz NOT NULL DEFAULT now(),
    changed_by    text NOT NULL DEFAULT session_user
);

-- name: create_strategy
-- purpose: Create the table that says how to search by each filter; 70_tune fills it.
-- lock: none on the target
-- undo: search.drop_function
CREATE TABLE IF NOT EXISTS {strategy} (
    target         text NOT NULL,
    filter         text NOT NULL,
    value          text,
    scan           text NOT NULL CHECK (scan IN ('index', 'relaxed', 'exact')),
    candidates     integer NOT NULL,
    iterative_scan text NOT NULL,
    most_scanned   integer NOT NULL,
    share          double precision NOT NULL,
    recall         double precision NOT NULL,
    p50_ms         double precision NOT NULL,
    -- Where every table is published, one without a primary key takes no UPDATE.
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY
);
CREATE UNIQUE INDEX IF NOT EXISTS strategy_of_a_value ON {strategy} (target, filter, coalesce(value, ''), (value IS NULL));
COMMENT ON TABLE {strategy} IS 'How the search functions search: one row a filter and value, as last measured. '
    'A value that is not listed is searched by the row whose value is NULL, a filter without rows as no filter.'
    ' Filters given together have rows of their own, "a & b" with their values as a JSON array; together without'
    ' any row, they are searched exactly.';

-- name: create_way_to_search
-- purpose: Create the function that says how to search by one value, so that callers need no access to the table of all values.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE OR REPLACE FUNCTION {way_to_search}(of_target text, of_filter text, of_value text)
RETURNS TABLE (scan text, candidates integer, iterative_scan text, most_scanned integer)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT way.scan, way.candidates, way.iterative_scan, way.most_scanned FROM (
        SELECT s.scan, s.candidates, s.iterative_scan, s.most_scanned, s.value IS NULL AS is_of_others
        FROM {strategy} s
        WHERE s.target = of_target AND s.filter = of_filter AND (s.value = of_value OR s.value IS NULL)
        UNION ALL
        SELECT 'unmeasured', NULL, NULL, NULL, NULL WHERE EXISTS (SELECT 1 FROM {strategy} s WHERE s.target = of_target)
    ) way ORDER BY way.is_of_others NULLS LAST LIMIT 1
$$;

-- name: start_with_legacy
-- purpose: Send every read to the legacy query.
-- lock: one row of the route table
-- undo: search.drop_function
INSERT INTO {route} (target, route, share_percent) VALUES ({target_name}, 'legacy', 0) ON CONFLICT DO NOTHING;

-- name: create_function
-- purpose: Create the function that the application calls, and the functions that answer for it, one for each route.
-- lock: none on the target
-- undo: search.drop_function
{parts};

-- name: drop_former
-- purpose: Drop the functions that answered with other arguments, a moment later: calls under way still use them.
-- lock: none on the target
-- undo: search.create_function
SELECT pg_sleep({seconds});
DROP FUNCTION IF EXISTS {functions};

-- name: legacy_is_retired
-- purpose: Is the route barred from going back to legacy?
SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass(%(route)s) AND conname = %(name)s) AS retired;

-- name: grant
-- purpose: Let the application's role call the function and read the route.
-- lock: none on the target
-- undo: search.drop_function
GRANT EXECUTE ON FUNCTION {functions} TO {role};
GRANT USAGE ON SCHEMA {ledger} TO {role};
GRANT SELECT ON {route} TO {role};
GRANT EXECUTE ON FUNCTION {way_to_search}(text, text, text) TO {role};

-- name: set_search_settings
-- purpose: Give the function the measured index settings.
-- lock: none on the target
-- undo: search.reset_search_settings
ALTER FUNCTION {signature} SET {setting} = {value};

-- name: reset_search_settings
-- purpose: Remove the index settings from the function.
-- lock: none on the target
-- undo: search.set_search_settings
ALTER FUNCTION {signature} RESET {setting};

-- name: drop_function
-- purpose: Remove the search function, the functions that answer for it, and this target's route and strategies.
-- lock: none on the target
-- undo: search.create_function
DROP FUNCTION IF EXISTS {functions};
DELETE FROM {route} WHERE target = {target_name};
DELETE FROM {strategy} WHERE target = {target_name};

-- name: forget_strategies
-- purpose: Forget how to search by each filter; every search then uses the function's own settings.
-- lock: rows of the strategy table
-- undo: search.learn_strategy
DELETE FROM {strategy} WHERE target = {target_name};

-- name: learn_strategy
-- purpose: Record how to search by a filter value, or (NULL) by every unlisted value.
-- lock: one row of the strategy table
-- undo: search.forget_strategies
INSERT INTO {strategy} (target, filter, value, scan, candidates, iterative_scan, most_scanned, share, recall, p50_ms)
SELECT {target_name}, %(filter)s, v.value, %(scan)s, %(candidates)s, %(iterative_scan)s, %(most_scanned)s,
       v.share, %(recall)s, %(p50_ms)s
FROM unnest(%(values)s::text[], %(shares)s::double precision[]) AS v (value, share);

-- name: strategies
-- purpose: How this target is searched by each filter, rarest values first.
SELECT filter, value, scan, candidates, iterative_scan, most_scanned, share, recall, p50_ms
FROM {strategy} WHERE target = {target_name} ORDER BY filter, share, value;

-- name: move_route
-- purpose: Move the reads: one row, one transaction.
-- lock: one row of the route table
-- undo: search.move_route with route legacy
UPDATE {route} SET route = %(route)s, share_percent = %(share_percent)s, changed_at = now(), changed_by = session_user
WHERE target = {target_name};

-- name: current_route
-- purpose: Where reads go now.
SELECT route, share_percent, changed_at, changed_by, clock_timestamp() AS now FROM {route} WHERE target = {target_name};

-- name: drawn
-- purpose: Which texts a share sends to the new route, by the same hash that the function uses.
SELECT query_text AS text FROM unnest(%(texts)s::text[]) AS query_text WHERE {draw} < %(share_percent)s;

-- name: function_state
-- purpose: The function that the application calls, as the catalogue has it.
SELECT p.oid::regprocedure::text AS function, p.provolatile AS volatility, p.prosecdef AS security_definer,
       p.proconfig AS settings, md5(p.prosrc) AS source
FROM pg_proc p
WHERE p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s AND {is_called};

-- name: installed
-- purpose: This target's functions: who may call them, what depends on them, and whether they are as intended.
WITH wanted AS (
    SELECT w.schema, w.name, w.source, w.names, w.defaults,
           (SELECT string_agg(to_regtype(t.name)::oid::text, ' ' ORDER BY t.i)
            FROM unnest(w.takes) WITH ORDINALITY AS t (name, i)) AS takes,
           (SELECT string_agg(to_regtype(t.name)::oid::text, ' ' ORDER BY t.i)
            FROM unnest(w.types) WITH ORDINALITY AS t (name, i)) AS types
    FROM jsonb_to_recordset(%(wanted)s::jsonb)
        AS w (schema text, name text, source text, names text[], takes text[], types text[], defaults text[])
)
SELECT format('%%I.%%I(%%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) AS function,
       p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s AND {is_called} AS is_called,
       p.pronamespace = to_regnamespace(%(ledger)s) AND p.proname = ANY (%(by_route)s) AS answers,
       w.names IS NOT NULL AS fits,
       EXISTS (SELECT FROM wanted o WHERE to_regnamespace(quote_ident(o.schema)) = n.oid AND o.name = p.proname
               AND o.takes = p.proargtypes::text) AS is_in_the_way,
       w.source IS NOT DISTINCT FROM md5(p.prosrc) AND w.defaults = ARRAY(
           SELECT regexp_replace(spelt, '^NULL::.*', 'NULL')
           FROM generate_series(1, p.pronargs) i, pg_get_function_arg_default(p.oid, i) spelt
           WHERE spelt IS NOT NULL ORDER BY i
       ) AS same,
       obj_description(p.oid, 'pg_proc') AS comment,
       CASE WHEN pg_get_userbyid(p.proowner) <> current_user THEN pg_get_userbyid(p.proowner)::text END AS owner,
       ARRAY(SELECT jsonb_build_object('role', CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee) END,
                                       'grants', a.is_grantable)
             FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
             WHERE a.grantee <> p.proowner AND a.privilege_type = 'EXECUTE' ORDER BY a.grantee) AS callers,
       ARRAY(SELECT DISTINCT coalesce((SELECT 'view ' || r.ev_class::regclass FROM pg_rewrite r
                                       WHERE d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid),
                                      pg_describe_object(d.classid, d.objid, d.objsubid))
             FROM pg_depend d
             WHERE d.refclassid = 'pg_proc'::regclass AND d.refobjid = p.oid AND d.deptype IN ('n', 'a')
             ORDER BY 1) AS needed_by
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
LEFT JOIN wanted w ON to_regnamespace(quote_ident(w.schema)) = n.oid AND w.name = p.proname
    AND w.takes = p.proargtypes::text AND w.names = p.proargnames
    AND w.types = array_to_string(coalesce(p.proallargtypes, p.proargtypes::oid[]), ' ')
WHERE p.pronamespace = to_regnamespace(%(ledger)s) AND p.proname = ANY (%(by_route)s)
   OR p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s
      AND 'answered_by' = ANY (p.proargnames) AND {of_trusted_owner}
ORDER BY 1;

-- name: text_search_config
-- purpose: The text search configuration by a name, with or without its schema, and spelt whole: the function's search
-- path need not lead to it.
SELECT c.oid::bigint AS oid, format('%%I.%%I', n.nspname, c.cfgname) AS spelled
FROM pg_ts_config c JOIN pg_namespace n ON n.oid = c.cfgnamespace
WHERE %(config)s::text IN (c.cfgname::text, quote_ident(c.cfgname), n.nspname || '.' || c.cfgname,
                           format('%%I.%%I', n.nspname, c.cfgname))
ORDER BY pg_ts_config_is_visible(c.oid) DESC, n.nspname = %(schema)s::text DESC, n.nspname LIMIT 1;

-- name: call
-- purpose: Call the function as the application does.
SELECT * FROM {function}(%(query)s::text, %(embedding)s::real[], %(k)s::integer);

-- name: call_filtered
-- purpose: Call the function with its filters; a NULL filter matches every row.
SELECT * FROM {function}(%(query)s::text, %(embedding)s::real[], %(k)s::integer{filters});

-- name: count_matching
-- purpose: How many rows with a vector match these filters, up to k.
SELECT count(*) AS rows FROM (SELECT 1 FROM {from_vectors} WHERE {filters} AND {row_embedding} IS NOT NULL LIMIT %(k)s) m;

-- name: texts_of
-- purpose: The beginning of these rows' first text.
SELECT {one t.key AS key}, left(t.{first_text_column}::text, 200) AS text FROM {table} t
WHERE {t.key IN texts %keys};

-- name: force_route
-- purpose: Set the route of this transaction's calls, whatever the table says.
SELECT set_config('runbook.route', %(route)s, true);
