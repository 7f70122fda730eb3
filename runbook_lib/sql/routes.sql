-- The searches that are compared, and that the functions of search_function.sql hold. {query_text}, {query_vector}
-- and {k} are bound values for a client, $1 $2 $3 inside a function.

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
    SELECT key, pg_catalog.row_number() OVER (ORDER BY distance, key) AS place FROM nearest WHERE {near_enough}
    UNION ALL
    SELECT key, pg_catalog.row_number() OVER (ORDER BY rank DESC, key) FROM matching
), best AS (
    SELECT key, pg_catalog.sum(1.0 / (60 + place))::double precision AS score
    FROM votes GROUP BY key
    ORDER BY score DESC, key
    LIMIT {k}
)
SELECT best.key, {row_similarity} AS similarity, best.score
FROM {with_vectors} JOIN best ON best.key = t.{key}
ORDER BY best.score DESC, best.key;

-- name: fulltext
-- purpose: Full text alone, as in hybrid, any word of the query, best rank first.
SELECT t.{key} AS key, ts_rank(d.document, w.any_word, 1) AS score
FROM {table} t CROSS JOIN LATERAL (SELECT {fulltext} AS document) d,
     (SELECT replace(plainto_tsquery({fulltext_config}, %(query)s)::text, ' & ', ' | ')::tsquery AS any_word) w
WHERE d.document @@ w.any_word
ORDER BY score DESC, t.{key}
LIMIT %(k)s;
