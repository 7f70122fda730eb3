-- Phase 80: a share of the live calls, answered by both searches. {arguments}, {result} and {settings} are those of the
-- search function, as the catalogue has them.

-- name: function_facts
-- purpose: The search function's arguments, result and settings.
SELECT pg_get_function_arguments(p.oid) AS arguments, pg_get_function_identity_arguments(p.oid) AS identity,
       pg_get_function_result(p.oid) AS result, coalesce(p.proconfig, '{{}}') AS settings,
       p.proargnames[1:p.pronargs] AS passed, p.proargnames[p.pronargs + 1:] AS results
FROM pg_proc p
WHERE p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s AND {is_called};

-- name: functions
-- purpose: The function that the application calls during the shadow phase, and its overloads, as DROP needs them.
SELECT format('%%I.%%I(%%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) AS function
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s
  AND 'answered_by' = ANY (p.proargnames) AND {of_trusted_owner};

-- name: create_log
-- purpose: Create the log of sampled calls: a hash of the text, names of the filters, both answers and times; no text.
-- lock: none on the target
-- undo: live.drop_log
CREATE TABLE IF NOT EXISTS {log} (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    logged_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    text_hash   bytea NOT NULL,
    filters     text[] NOT NULL DEFAULT '{{}}',
    live_route  text NOT NULL,
    live_ms     double precision NOT NULL,
    live_keys   text[] NOT NULL,
    other_route text NOT NULL,
    other_ms    double precision,
    other_keys  text[],
    problem     text
);
CREATE INDEX IF NOT EXISTS {log_index} ON {log} (logged_at);

-- name: create_function
-- purpose: Create the function that answers like the search function, and runs the other search as well for a share of the calls.
-- lock: none on the target
-- undo: live.drop_function
{drop_outdated}CREATE OR REPLACE FUNCTION {shadow_function}({arguments}) RETURNS {result}
LANGUAGE plpgsql VOLATILE {settings} AS $runbook$
DECLARE
    answer     record;
    began      timestamptz := clock_timestamp();
    live       text;
    live_ms    double precision;
    live_keys  text[] := '{{}}';
    other      text := {new_route};
    other_keys text[];
    filters    text[] := array_remove(ARRAY[{filters_given}]::text[], NULL);
    forced     text := current_setting('runbook.route', true);
BEGIN
    FOR answer IN SELECT * FROM {function}({passed}) LOOP
        {take_over}
        live := answer.answered_by;
        live_keys := live_keys || {one answer.key}::text;
        RETURN NEXT;
    END LOOP;
    live_ms := 1000 * extract(epoch FROM clock_timestamp() - began);
    IF query_embedding IS NULL OR random() * 100 >= {sample_percent}
        OR current_setting('transaction_read_only')::boolean
    THEN
        RETURN;
    END IF;
    -- Nothing that happens from here on may fail the call, which has its answer.
    BEGIN
        IF (SELECT count(*) FROM {log} l WHERE l.logged_at BETWEEN clock_timestamp() - interval '1 minute' AND clock_timestamp()) >= {most_calls}
        THEN
            RETURN;
        END IF;
        -- The answer says by which route it came; one without rows does not.
        IF live IS NULL THEN
            SELECT r.route INTO live FROM {route} r
            WHERE r.target = {target_name} AND {draw} OPERATOR(pg_catalog.<) r.share_percent;
            live := coalesce(nullif(forced, ''), live, 'legacy');
        END IF;
        IF live <> 'legacy' THEN
            other := 'legacy';
        END IF;
        began := clock_timestamp();
        BEGIN
            -- The very function that would answer, with the way that it takes for these filters.
            PERFORM set_config('runbook.route', other, true);
            SELECT array_agg({one f.key}::text) INTO other_keys FROM {function}({passed}) f;
            PERFORM set_config('runbook.route', coalesce(forced, ''), true);
            INSERT INTO {log} (text_hash, filters, live_route, live_ms, live_keys, other_route, other_ms, other_keys)
            VALUES (sha256(convert_to(query_text, 'UTF8')), filters, live, live_ms, live_keys, other,
                    1000 * extract(epoch FROM clock_timestamp() - began), coalesce(other_keys, '{{}}'));
        EXCEPTION WHEN others THEN
            -- The route that was named ends with what failed.
            INSERT INTO {log} (text_hash, filters, live_route, live_ms, live_keys, other_route, problem)
            VALUES (sha256(convert_to(query_text, 'UTF8')), filters, live, live_ms, live_keys, other,
                    left(SQLSTATE || ' ' || SQLERRM, 500));
        END;
    EXCEPTION WHEN others THEN
        RAISE WARNING 'the shadow of this call was not logged: %% %%', SQLSTATE, SQLERRM;
    END;
END
$runbook$;

-- name: create_overloads
-- purpose: Create its overloads for the types of a query's vector that the search function takes.
-- lock: none on the target
-- undo: live.drop_function
{overloads};

-- name: grant
-- purpose: Let the application's role call it and write the log, except its numbers and times; of the log it may read only the times.
-- lock: none on the target
-- undo: live.drop_function
GRANT EXECUTE ON FUNCTION {functions} TO {role};
REVOKE INSERT ON {log} FROM {role};
GRANT INSERT (text_hash, filters, live_route, live_ms, live_keys, other_route, other_ms, other_keys, problem),
    SELECT (logged_at) ON {log} TO {role};

-- name: drop_function
-- purpose: Remove the function that the application called during the shadow phase.
-- lock: none on the target
-- undo: live.create_function
DROP FUNCTION IF EXISTS {functions};

-- name: drop_log
-- purpose: Remove the log of sampled calls.
-- lock: none on the target
-- undo: live.create_log
DROP TABLE IF EXISTS {log};

-- name: what_is_there
-- purpose: Is there a function of that name, or an overload of it, and a log?
SELECT EXISTS (SELECT FROM pg_proc p WHERE p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s
               AND 'answered_by' = ANY (p.proargnames) AND {of_trusted_owner}) AS function,
       to_regclass(%(log)s) IS NOT NULL AS log;

-- name: logged
-- purpose: The newest sampled calls, since a time or (NULL) of all. The application can write anything into the log, so rows that the function would not write are left out.
SELECT filters, live_route, live_ms, live_keys, other_route, other_ms, other_keys, left(problem, 500) AS problem
FROM (
    SELECT l.* FROM {log} l
    WHERE (%(since)s::timestamptz IS NULL OR l.logged_at >= %(since)s)
      AND l.filters <@ %(filters)s::text[] AND coalesce(array_ndims(l.filters), 1) = 1
      AND cardinality(l.filters) <= cardinality(%(filters)s::text[])
      AND l.live_route <> l.other_route AND 'legacy' IN (l.live_route, l.other_route)
      AND l.live_route = ANY (%(routes)s) AND l.other_route = ANY (%(routes)s)
      AND l.live_ms >= 0 AND l.live_ms < 'infinity' AND coalesce(array_ndims(l.live_keys), 1) = 1
      AND pg_column_size(l.live_keys) < 100000
      AND (l.problem IS NOT NULL OR l.other_ms >= 0 AND l.other_ms < 'infinity' AND l.other_keys IS NOT NULL
           AND coalesce(array_ndims(l.other_keys), 1) = 1 AND pg_column_size(l.other_keys) < 100000)
    ORDER BY l.id DESC LIMIT %(most)s
) newest ORDER BY id;
