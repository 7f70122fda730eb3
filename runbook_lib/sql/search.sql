-- The searches that are compared, and the function that the application calls. {query_text}, {query_vector} and {k}
-- are bound values for a client, $1 $2 $3 inside the function.

-- name: exact_or_vector
-- purpose: The nearest rows by distance; with the index, or by reading every row.
SELECT t.{key} AS key, -({row_embedding} {distance} {query_vector}) AS score
FROM {from_vectors}
WHERE {filters} AND {row_embedding} IS NOT NULL
ORDER BY {nearest_first}
LIMIT {k};

-- name: relaxed
-- purpose: The nearest rows through an index that finds them nearly in order; sorted by their vectors once found.
WITH nearest AS MATERIALIZED (
    SELECT t.{key} AS key, {row_embedding} {distance} {query_vector} AS distance
    FROM {from_vectors}
    WHERE {filters} AND {row_embedding} IS NOT NULL
    ORDER BY {nearest_first}
    LIMIT {nearest_rows}
)
SELECT key, -distance AS score FROM nearest ORDER BY distance + 0 LIMIT {k};

-- name: hybrid
-- purpose: Nearest rows and best full-text rows, merged by reciprocal rank fusion (Cormack et al. 2009, constant 60).
WITH nearest AS MATERIALIZED (
    SELECT t.{key} AS key, {row_embedding} {distance} {query_vector} AS distance
    FROM {from_vectors}
    WHERE {filters} AND {row_embedding} IS NOT NULL
    ORDER BY {nearest_first}
    LIMIT {nearest_candidates}
), words AS (
    SELECT pg_catalog.replace(
        pg_catalog.plainto_tsquery({fulltext_config}, {query_text})::pg_catalog.text, ' & ', ' | '
    )::pg_catalog.tsquery AS any_word
), matching AS MATERIALIZED (
    SELECT t.{key} AS key, pg_catalog.ts_rank(d.document, w.any_word, 1) AS rank
    FROM {table} t CROSS JOIN LATERAL (SELECT {fulltext} AS document) d, words w
    WHERE d.document OPERATOR(pg_catalog.@@) w.any_word AND {filters}
    ORDER BY rank DESC, t.{key}
    LIMIT {candidates}
), votes AS (
    SELECT key, pg_catalog.row_number() OVER (ORDER BY distance, key) AS place FROM nearest
    UNION ALL
    SELECT key, pg_catalog.row_number() OVER (ORDER BY rank DESC, key) FROM matching
)
SELECT key, pg_catalog.sum(1.0 / (60 + place))::double precision AS score
FROM votes GROUP BY key
ORDER BY score DESC, key
LIMIT {k};

-- name: fulltext
-- purpose: Full text alone, as in hybrid, any word of the query, best rank first.
SELECT t.{key} AS key, ts_rank(d.document, w.any_word, 1) AS score
FROM {table} t CROSS JOIN LATERAL (SELECT {fulltext} AS document) d,
     (SELECT replace(plainto_tsquery({fulltext_config}, %(query)s)::text, ' & ', ' | ')::tsquery AS any_word) w
WHERE d.document @@ w.any_word
ORDER BY score DESC, t.{key}
LIMIT %(k)s;

-- name: create_route
-- purpose: Create the table that says where reads go; moving them is one row in one transaction.
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
-- purpose: Create the table that says how to search by which filter; 70_tune fills it.
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
-- purpose: Create the function that says how to search by one value, so callers need not read all values of all rows.
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
        SELECT 'unmeasured', NULL, NULL, NULL, NULL WHERE EXISTS (SELECT FROM {strategy} s WHERE s.target = of_target)
    ) way ORDER BY way.is_of_others NULLS LAST LIMIT 1
$$;

-- name: start_with_legacy
-- purpose: Send every read to the legacy query.
-- lock: one row of the route table
-- undo: search.drop_function
INSERT INTO {route} (target, route, share_percent) VALUES ({target_name}, 'legacy', 0) ON CONFLICT DO NOTHING;

-- name: create_function
-- purpose: Create the one function that the application calls; it answers by the route in the table.
-- lock: none on the target
-- undo: search.drop_function
CREATE OR REPLACE FUNCTION {function}({arguments})
RETURNS TABLE ({key} {key_type}, score double precision, answered_by text)
LANGUAGE plpgsql STABLE SET search_path = {search_path} {kept_settings} AS $runbook$
DECLARE
    chosen       text := 'legacy';
    way          text := 'index';
    how          record;
    asked_filter text;
    asked_value  text;
BEGIN
    k := coalesce(k, {default_k});
    IF k < 0 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = pg_catalog.format('k is %%s, needed: 0 or more', k);
    END IF;
    IF query_embedding IS NOT NULL THEN
        {refuse_vector};
        -- A shadow, or who measures, names the route of a call in this setting; nobody else has a reason to.
        chosen := nullif(pg_catalog.current_setting('runbook.route', true), '');
        IF chosen IS NULL THEN
            -- The share is drawn by the text, so that a query is answered by one route as long as the share stands.
            SELECT r.route INTO chosen FROM {route} r
            WHERE r.target OPERATOR(pg_catalog.=) {target_name}::pg_catalog.text
              AND {draw} OPERATOR(pg_catalog.<) r.share_percent;
        END IF;
        chosen := coalesce(chosen, 'legacy');
    END IF;
    {choose_way};
    IF chosen = 'vector' AND way = 'exact' THEN
        RETURN QUERY EXECUTE {vector_exact_query} USING {using};
    ELSIF chosen = 'vector' AND way = 'relaxed' THEN
        RETURN QUERY EXECUTE {vector_relaxed_query} USING {using};
    ELSIF chosen = 'vector' THEN
        RETURN QUERY EXECUTE {vector_query} USING {using};
    ELSIF chosen = 'hybrid' AND way = 'exact' THEN
        RETURN QUERY EXECUTE {hybrid_exact_query} USING {using};
    ELSIF chosen = 'hybrid' THEN
        RETURN QUERY EXECUTE {hybrid_query} USING {using};
    ELSE
        {legacy_answer};
    END IF;
END
$runbook$;

-- name: refuse_vector
-- purpose: Part of the function: a vector that no row can be compared with is an error on every route, not only later.
IF pg_catalog.cardinality(query_embedding) <> {dimension} THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = pg_catalog.format(
                'query_embedding has %%s dimensions, the vectors searched have %%s',
                pg_catalog.cardinality(query_embedding), {dimension});
        ELSIF pg_catalog.array_position(query_embedding, 'NaN'::pg_catalog.float4) IS NOT NULL
            OR pg_catalog.array_position(query_embedding, 'Infinity'::pg_catalog.float4) IS NOT NULL
            OR pg_catalog.array_position(query_embedding, '-Infinity'::pg_catalog.float4) IS NOT NULL
            OR pg_catalog.array_position(query_embedding, NULL::pg_catalog.float4) IS NOT NULL
        THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = 'query_embedding holds NaN, infinity or NULL, which no vector may hold';
        ELSIF {refuses_zero} AND query_embedding = pg_catalog.array_fill(0::pg_catalog.float4, ARRAY[{dimension}]) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = 'query_embedding is a vector of zeros, which has no direction to compare';
        END IF;

-- name: answer_by_legacy
-- purpose: Part of the function: the legacy search answers.
{users_path}RETURN QUERY EXECUTE {legacy_query} USING {using};

-- name: refuse_legacy
-- purpose: Part of the function once legacy is retired: without its indexes it would read the whole table.
RAISE EXCEPTION USING ERRCODE = 'feature_not_supported', MESSAGE = {retired_message},
            HINT = 'Pass query_embedding. undo/reads brings the legacy search back, with its indexes.';

-- name: legacy_is_retired
-- purpose: Is the route kept from going back to legacy?
SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass(%(route)s) AND conname = %(name)s) AS retired;

-- name: choose_way
-- purpose: Part of the function, for a target with filters: how to search by those that are given.
IF chosen <> 'legacy' AND num_nonnulls({filter_arguments}) > 0 THEN
        asked_filter := {asked_filter};
        asked_value := {asked_value};
        SELECT w.* INTO how FROM {way_to_search}({target_name}::pg_catalog.text, asked_filter, asked_value) w;
        IF how.scan = 'unmeasured' THEN
            -- How few rows several filters let through together nobody has measured; to read them all misses none.
            IF num_nonnulls({filter_arguments}) > 1 THEN
                way := 'exact';
            END IF;
        ELSIF FOUND THEN
            way := how.scan;
            -- They end with this call: the function has a SET for each of them.
            PERFORM pg_catalog.set_config({setting}, how.candidates::pg_catalog.text, true),
                    pg_catalog.set_config({iterative_setting}, how.iterative_scan, true),
                    pg_catalog.set_config({most_scanned_setting}, how.most_scanned::pg_catalog.text, true);
        END IF;
    END IF;

-- name: grant
-- purpose: Let the application's role call the function and read the route.
-- lock: none on the target
-- undo: search.drop_function
GRANT EXECUTE ON FUNCTION {function}({signature}) TO {role};
GRANT USAGE ON SCHEMA {ledger} TO {role};
GRANT SELECT ON {route} TO {role};
GRANT EXECUTE ON FUNCTION {way_to_search}(text, text, text) TO {role};

-- name: set_search_settings
-- purpose: Give the function the measured index settings.
-- lock: none on the target
-- undo: search.reset_search_settings
ALTER FUNCTION {function}({signature}) SET {setting} = {value};

-- name: reset_search_settings
-- purpose: Remove the index settings from the function.
-- lock: none on the target
-- undo: search.set_search_settings
ALTER FUNCTION {function}({signature}) RESET {setting};

-- name: drop_function
-- purpose: Remove the search function, this target's route and its strategies.
-- lock: none on the target
-- undo: search.create_function
DROP FUNCTION IF EXISTS {function}({signature});
DELETE FROM {route} WHERE target = {target_name};
DELETE FROM {strategy} WHERE target = {target_name};

-- name: forget_strategies
-- purpose: Forget how to search by which filter; every search then uses the function's own settings.
-- lock: rows of the strategy table
-- undo: search.learn_strategy
DELETE FROM {strategy} WHERE target = {target_name};

-- name: learn_strategy
-- purpose: Record how to search by a filter's value, or (NULL) by every value that is not listed.
-- lock: one row of the strategy table
-- undo: search.forget_strategies
INSERT INTO {strategy} (target, filter, value, scan, candidates, iterative_scan, most_scanned, share, recall, p50_ms)
SELECT {target_name}, %(filter)s, v.value, %(scan)s, %(candidates)s, %(iterative_scan)s, %(most_scanned)s,
       v.share, %(recall)s, %(p50_ms)s
FROM unnest(%(values)s::text[], %(shares)s::double precision[]) AS v (value, share);

-- name: strategies
-- purpose: How this target is searched by which filter, rarest values first.
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
-- purpose: The function as the catalogue has it.
SELECT p.oid::regprocedure::text AS function, p.provolatile AS volatility, p.prosecdef AS security_definer,
       p.proconfig AS settings, md5(p.prosrc) AS source
FROM pg_proc p
WHERE p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s AND {of_trusted_owner};

-- name: column_types
-- purpose: The types of the key and the filters, without their lengths, which a cast would cut a longer value to; and
-- the operator of equality of each, that of its default btree operator class. Types without a class of their own, such
-- as enums and varchar, have PostgreSQL's.
WITH RECURSIVE wanted AS (
    SELECT a.attname AS name, a.atttypid AS type FROM pg_attribute a
    WHERE a.attrelid = to_regclass(%(table)s) AND a.attname = ANY (%(columns)s) AND NOT a.attisdropped
), base AS (
    SELECT name, type FROM wanted
    UNION ALL
    SELECT b.name, t.typbasetype FROM base b JOIN pg_type t ON t.oid = b.type WHERE t.typtype = 'd'
)
SELECT w.name,
       CASE n.nspname WHEN 'pg_catalog' THEN format_type(t.oid, -1) ELSE format('%%I.%%I', n.nspname, t.typname) END AS type,
       coalesce(
           (SELECT format('OPERATOR(%%I.%%s)', s.nspname, o.oprname) FROM base b
            JOIN pg_opclass c ON c.opcintype = b.type AND c.opcdefault
            JOIN pg_am am ON am.oid = c.opcmethod AND am.amname = 'btree'
            JOIN pg_amop ao ON ao.amopfamily = c.opcfamily AND ao.amopstrategy = 3
                           AND ao.amoplefttype = c.opcintype AND ao.amoprighttype = c.opcintype
            JOIN pg_operator o ON o.oid = ao.amopopr JOIN pg_namespace s ON s.oid = o.oprnamespace
            WHERE b.name = w.name LIMIT 1),
           'OPERATOR(pg_catalog.=)') AS equals
FROM wanted w JOIN pg_type t ON t.oid = w.type JOIN pg_namespace n ON n.oid = t.typnamespace;

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
-- purpose: Call the function with its filters; one that is NULL lets every row through.
SELECT * FROM {function}(%(query)s::text, %(embedding)s::real[], %(k)s::integer{filters});

-- name: count_matching
-- purpose: How many rows with a vector these filters let through, up to k.
SELECT count(*) AS rows FROM (SELECT FROM {from_vectors} WHERE {filters} AND {row_embedding} IS NOT NULL LIMIT %(k)s) m;

-- name: force_route
-- purpose: Name the route of the calls of this transaction, whatever the table says.
SELECT set_config('runbook.route', %(route)s, true);
