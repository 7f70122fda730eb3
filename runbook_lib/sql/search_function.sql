-- The functions that are installed for a target: the one that the application calls, one for each way to answer, and
-- the check of a query's vector. All run with their caller's rights. search.create_function puts them together.

-- name: search
-- purpose: The function that the application calls: it checks its arguments, looks up the route, and calls that route's function.
CREATE OR REPLACE FUNCTION {function}({arguments})
RETURNS TABLE ({results})
LANGUAGE plpgsql STABLE ROWS {default_k}
SET search_path = pg_catalog, pg_temp {kept_settings} AS $runbook$
#variable_conflict use_variable
DECLARE
    chosen text := 'legacy';{declared}
BEGIN
    k := coalesce(k, {default_k});
    IF k < 0 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = pg_catalog.format('k is %%s, needed: 0 or more', k);
    END IF;
    IF query_embedding IS NOT NULL THEN
        PERFORM {check_vector}(query_embedding, {dimension}, {refuses_zero});
        -- Only shadows and measurements set the route of a call by this setting.
        chosen := nullif(pg_catalog.current_setting('runbook.route', true), '');
        IF chosen IS NULL THEN
            -- Drawn by the text, so that the same query keeps its route until the share changes.
            SELECT r.route INTO chosen FROM {route} r
            WHERE r.target OPERATOR(pg_catalog.=) {target_name}::pg_catalog.text
              AND {draw} OPERATOR(pg_catalog.<) r.share_percent;
        END IF;
        chosen := coalesce(chosen, 'legacy');
    END IF;{choose_way}
    {answers}
END
$runbook$;

-- name: choose_way
-- purpose: Part of the function, for a target with filters: how to search by the given filters.
IF chosen <> 'legacy' AND num_nonnulls({filter_arguments}) > 0 THEN
    {asked};
    SELECT w.* INTO how FROM {way_to_search}({target_name}::pg_catalog.text, asked_filter, asked_value) w;{of_others}
    IF NOT FOUND OR how.scan = 'unmeasured' THEN
        -- How many rows match was not measured; an exact scan misses none.
        IF {exact_unmeasured} THEN
            way := 'exact';
        END IF;
    ELSE
        way := how.scan;
        -- These settings end with this call, since the function has a SET for each.
        PERFORM pg_catalog.set_config({setting}, how.candidates::pg_catalog.text, true),
                pg_catalog.set_config({iterative_setting}, how.iterative_scan, true),
                pg_catalog.set_config({most_scanned_setting}, how.most_scanned::pg_catalog.text, true);
    END IF;
END IF;

-- name: way_of_others
-- purpose: Part of the function: filters given together that were not measured are searched like others that match as few rows.
IF how.scan = 'unmeasured' AND num_nonnulls({filter_arguments}) > 1 AND num_nonnulls({conditions}) > 0 THEN
    SELECT w.* INTO how FROM {way_to_search}({target_name}::pg_catalog.text, {together}, asked_value) w;
END IF;

-- name: asked
-- purpose: Part of the function: the given filters and their values, as the strategies name them.
asked_filter := {asked_filter};
asked_value := {asked_value};

-- name: asked_of_conditions
-- purpose: Part of the function: the same, but for a condition by the share of the rows that match instead of the value.
IF num_nonnulls({conditions}) = 0 THEN
    asked_filter := {asked_filter};
    asked_value := {asked_value};
ELSE
    asked_filter := {asked_condition};
    asked_value := {by_share}({filter_arguments});
END IF;

-- name: choose_way_variables
-- purpose: Part of the function, for a target with filters: its variables.

way    text := 'index';
how    record;
asked_filter text;
asked_value  text;

-- name: answer
-- purpose: Part of the function: call one route's function.
RETURN QUERY
SELECT {answer.own_key}, answer.score, {answered_by}, answer.similarity, answer.rank::pg_catalog.int4{columns}
FROM {by_route}({passed}) WITH ORDINALITY AS answer ({own_key}, similarity, score, rank){of_the_row};

-- name: of_the_row
-- purpose: Part of the function, for search.returns: the row with the returned columns; LEFT JOIN, since legacy may return a key without a row.
LEFT JOIN {table} t ON {t.key = answer.own_key}

-- name: overload
-- purpose: The same function, for a query's vector in another type.
CREATE OR REPLACE FUNCTION {function}({arguments})
RETURNS TABLE ({results})
LANGUAGE plpgsql STABLE ROWS {default_k} SET search_path = pg_catalog, pg_temp AS $runbook$
-- {what}
#variable_conflict use_variable
BEGIN
    RETURN QUERY SELECT answer.* FROM {function}({passed}) AS answer;
END
$runbook$;

-- name: refuse_legacy
-- purpose: Part of the function once legacy is retired: without its indexes it would read the whole table.
RAISE EXCEPTION USING ERRCODE = 'feature_not_supported', MESSAGE = {retired_message},
    HINT = 'Pass query_embedding. undo/reads brings the legacy search back, with its indexes.';

-- name: by_route
-- purpose: One way to answer: the k best rows, best first. It is planned for the values of each call.
CREATE OR REPLACE FUNCTION {by_route}({arguments})
RETURNS TABLE ({results})
LANGUAGE plpgsql STABLE ROWS {default_k}
SET search_path = {search_path} SET plan_cache_mode = force_custom_plan AS $runbook$
-- {what}
-- {arguments_by_number}
#variable_conflict use_column
{body}
$runbook$;

-- name: static
-- purpose: Part of a route's function: its query.
BEGIN
    RETURN QUERY
    {query};
END

-- name: put_together
-- purpose: Part of a route's function if a filter has a subquery: its query, with the conditions of the given filters only.
DECLARE
    filters text := {always};
BEGIN
    {given};
    RETURN QUERY EXECUTE pg_catalog.replace({query}, '/* given */', filters)
    USING {passed};
END

-- name: given
-- purpose: Part of a function: the condition of one filter, if it is given.
IF {argument} IS NOT NULL THEN
    filters := filters || ' AND ' || {condition};
END IF;

-- name: share
-- purpose: The class of the share of rows that the planner expects to match these filters; it reads none. It is volatile because it runs EXPLAIN.
CREATE OR REPLACE FUNCTION {by_share}({arguments})
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = {search_path} SET plan_cache_mode = force_custom_plan AS $runbook$
DECLARE
    filters     text := {always};
    let_through text;
    in_all      text;
    share       double precision;
BEGIN
    {given};
    EXECUTE pg_catalog.replace({rows_let_through}, '/* given */', filters) INTO let_through USING {passed};
    EXECUTE {rows_in_all} INTO in_all;
    -- The first line of a plan has the estimate for the whole plan.
    share := substring(let_through FROM {rows})::double precision
        / greatest(substring(in_all FROM {rows})::double precision, 1);
    RETURN {class};
END
$runbook$;

-- name: legacy
-- purpose: Part of the legacy route's function: its query, as it was given.
SELECT {legacy.key}, NULL::double precision, NULL::double precision
FROM (
{query}
) legacy

-- name: vector
-- purpose: Part of the vector route's functions: the nearest rows, with their similarity.
SELECT {best.own_key}, {similarity}, best.score
FROM (
    {query}
) best
WHERE {min_similarity} IS NULL OR {similarity} >= {min_similarity}

-- name: check_vector
-- purpose: Refuse a vector that cannot be compared, on every route, so that the mistake shows before reads move.
CREATE OR REPLACE FUNCTION {check_vector}(query_embedding real[], dimension integer, refuses_zero boolean)
RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $runbook$
BEGIN
    IF cardinality(query_embedding) <> dimension THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = format(
            'query_embedding has %%s dimensions, the vectors searched have %%s',
            cardinality(query_embedding), dimension);
    ELSIF array_position(query_embedding, 'NaN'::float4) IS NOT NULL
        OR array_position(query_embedding, 'Infinity'::float4) IS NOT NULL
        OR array_position(query_embedding, '-Infinity'::float4) IS NOT NULL
        OR array_position(query_embedding, NULL::float4) IS NOT NULL
    THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'query_embedding holds NaN, infinity or NULL, which no vector may hold';
    ELSIF refuses_zero AND query_embedding = array_fill(0::float4, ARRAY[dimension]) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'query_embedding is a vector of zeros, which has no direction to compare';
    END IF;
END
$runbook$;

-- name: path
-- purpose: Resolve names as the functions do, for this transaction.
SELECT set_config('search_path', %(path)s, true);
