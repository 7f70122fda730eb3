-- The searches that are compared, and the function that the application calls. {query_text}, {query_vector} and {k}
-- are bound values for a client, $1 $2 $3 inside the function.

-- name: exact_or_vector
-- purpose: The nearest rows by distance; with the index, or by reading every row.
SELECT t.{key} AS key, -({row_embedding} {distance} {query_vector}) AS score
FROM {from_vectors}
WHERE {filters}
ORDER BY {row_embedding} {distance} {query_vector}
LIMIT {k};

-- name: hybrid
-- purpose: Nearest rows and best full-text rows, merged by reciprocal rank fusion (Cormack et al. 2009, constant 60).
WITH nearest AS MATERIALIZED (
    SELECT t.{key} AS key, {row_embedding} {distance} {query_vector} AS distance
    FROM {from_vectors}
    WHERE {filters}
    ORDER BY {row_embedding} {distance} {query_vector}
    LIMIT {candidates}
), words AS (
    SELECT replace(plainto_tsquery({fulltext_config}, {query_text})::text, ' & ', ' | ')::tsquery AS any_word
), matching AS MATERIALIZED (
    SELECT t.{key} AS key, ts_rank(t.{fulltext}, w.any_word, 1) AS rank
    FROM {table} t, words w
    WHERE t.{fulltext} @@ w.any_word AND {filters}
    ORDER BY rank DESC, t.{key}
    LIMIT {candidates}
), votes AS (
    SELECT key, row_number() OVER (ORDER BY distance, key) AS place FROM nearest
    UNION ALL
    SELECT key, row_number() OVER (ORDER BY rank DESC, key) FROM matching
)
SELECT key, sum(1.0 / (60 + place))::double precision AS score
FROM votes GROUP BY key
ORDER BY score DESC, key
LIMIT {k};

-- name: create_route
-- purpose: Make the table that says where reads go; moving them is one row in one transaction.
-- lock: none on the target
-- undo: search.drop_function
CREATE TABLE IF NOT EXISTS {route} (
    target        text PRIMARY KEY,
    route         text NOT NULL CHECK (route IN ('legacy', 'vector', 'hybrid')),
    share_percent integer NOT NULL CHECK (share_percent BETWEEN 0 AND 100),
    changed_at    timestamptz NOT NULL DEFAULT now(),
    changed_by    text NOT NULL DEFAULT session_user
);

-- name: start_with_legacy
-- purpose: Send every read to the legacy query.
-- lock: one row of the route table
-- undo: search.drop_function
INSERT INTO {route} (target, route, share_percent) VALUES ({target_name}, 'legacy', 0) ON CONFLICT DO NOTHING;

-- name: create_function
-- purpose: Make the one function that the application calls; it answers by the route that the table says.
-- lock: none on the target
-- undo: search.drop_function
CREATE OR REPLACE FUNCTION {function}({arguments})
RETURNS TABLE ({key} {key_type}, score double precision, answered_by text)
LANGUAGE plpgsql STABLE SET search_path = {search_path} AS $runbook$
DECLARE
    chosen text := 'legacy';
BEGIN
    IF query_embedding IS NOT NULL THEN
        -- The share is drawn by the text, so that one query is answered by one route for as long as the share stands.
        SELECT r.route INTO chosen FROM {route} r
        WHERE r.target = {target_name} AND abs(hashtextextended(query_text, 0) %% 100) < r.share_percent;
        chosen := coalesce(chosen, 'legacy');
    END IF;
    IF chosen = 'vector' THEN
        RETURN QUERY EXECUTE {vector_query} USING {using};
    ELSIF chosen = 'hybrid' THEN
        RETURN QUERY EXECUTE {hybrid_query} USING {using};
    ELSE
        RETURN QUERY EXECUTE {legacy_query} USING {using};
    END IF;
END
$runbook$;

-- name: revoke_public
-- purpose: Let nobody call the function but its owner and the roles named in the parameters.
-- lock: none on the target
-- undo: search.drop_function
REVOKE ALL ON FUNCTION {function}({signature}) FROM PUBLIC;

-- name: grant
-- purpose: Let the application's role call the function and read the route.
-- lock: none on the target
-- undo: search.drop_function
GRANT EXECUTE ON FUNCTION {function}({signature}) TO {role};
GRANT USAGE ON SCHEMA {ledger} TO {role};
GRANT SELECT ON {route} TO {role};

-- name: set_search_settings
-- purpose: Give the function the index settings that were found by measuring.
-- lock: none on the target
-- undo: search.reset_search_settings
ALTER FUNCTION {function}({signature}) SET {setting} = {value};

-- name: reset_search_settings
-- purpose: Take the index settings from the function.
-- lock: none on the target
-- undo: search.set_search_settings
ALTER FUNCTION {function}({signature}) RESET {setting};

-- name: drop_function
-- purpose: Remove the search function and this target's route.
-- lock: none on the target
-- undo: search.create_function
DROP FUNCTION IF EXISTS {function}({signature});
DELETE FROM {route} WHERE target = {target_name};

-- name: move_route
-- purpose: Move the reads: one row, one transaction.
-- lock: one row of the route table
-- undo: search.move_route with route legacy
UPDATE {route} SET route = %(route)s, share_percent = %(share_percent)s, changed_at = now(), changed_by = session_user
WHERE target = {target_name};

-- name: current_route
-- purpose: Where reads go now.
SELECT route, share_percent, changed_at, changed_by FROM {route} WHERE target = {target_name};

-- name: drawn
-- purpose: Which texts a share sends to the new route, by the same hash that the function uses.
SELECT text FROM unnest(%(texts)s::text[]) AS text WHERE abs(hashtextextended(text, 0) %% 100) < %(share_percent)s;

-- name: function_state
-- purpose: The function as the catalogue has it.
SELECT p.oid::regprocedure::text AS function, p.provolatile AS volatility, p.prosecdef AS security_definer,
       p.proconfig AS settings, md5(p.prosrc) AS source
FROM pg_proc p
WHERE p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s;

-- name: column_types
-- purpose: The types of the key and the filters.
SELECT attname AS name, format_type(atttypid, NULL) AS type FROM pg_attribute
WHERE attrelid = to_regclass(%(table)s) AND attname = ANY (%(columns)s) AND NOT attisdropped;

-- name: call
-- purpose: Call the function as the application does.
SELECT * FROM {function}(%(query)s, %(embedding)s::real[], %(k)s);
