-- The searches that are compared, and that the functions of search_function.sql contain. {query_text}, {query_vector}
-- and {k} are bound values for a client, $1 $2 $3 inside a function.

-- name: exact_or_vector
-- purpose: The nearest rows by distance, with the index or by reading every row.
SELECT {t.key AS own_key}, -({row_embedding} {distance} {query_vector}) AS score
FROM {from_vectors}
WHERE {filters} AND {row_embedding} IS NOT NULL
ORDER BY {nearest_first}
LIMIT {k};

-- name: nearest
-- purpose: Part of relaxed and hybrid: the nearest rows in the order of the index, with their exact distances.
nearest AS MATERIALIZED (
    SELECT {t.key AS own_key}, {row_embedding} {distance} {query_vector} AS distance
    FROM {from_vectors}
    WHERE {filters} AND {row_embedding} IS NOT NULL
    ORDER BY {nearest_first}
    LIMIT {fetched}
)

-- name: relaxed
-- purpose: The nearest rows through an index that returns them in nearly the right order; then sorted by exact distance.
WITH {nearest}
SELECT {own_key}, -distance AS score FROM nearest ORDER BY distance + 0 LIMIT {k};

-- name: hybrid
-- purpose: The nearest rows and those that match best by words, ranked by the weighted sum of both scores; each score is scaled to mean 0 and standard deviation 1 over the rows that either half found.
SELECT {own_key}, {similarity} AS similarity,
       {vector_weight} * near + (1 - {vector_weight}) * wordy AS score
FROM (
    {scored}
) both_halves
ORDER BY score DESC, {own_key}
LIMIT {k};

-- name: scored
-- purpose: Part of hybrid: every row that either half found, with both scores.
WITH {nearest}, {words_half}, found AS (
    SELECT {own_key} FROM nearest WHERE {near_enough}
    UNION
    SELECT {own_key} FROM matching
), weighed AS MATERIALIZED (
    {weighed}
)
SELECT {own_key}, distance,
       coalesce((avg(distance) OVER () - distance) / nullif(stddev_pop(distance) OVER (), 0), 0) AS near,
       coalesce((weight - avg(weight) OVER ()) / nullif(stddev_pop(weight) OVER (), 0), 0) AS wordy
FROM weighed

-- name: by_rare_words
-- purpose: Part of hybrid: the rows that contain rare words of the query, ranked by the weights of those words. The number of rows read is limited however common the words are. So is the number read to find a code, whose parts may be common: an index does not know their order.
words AS MATERIALIZED (
    SELECT w.* FROM {weigh_words}({query_text}) w
), holding AS MATERIALIZED (
    SELECT {row_of.own_key}, w.weight
    FROM (
        SELECT words.*, pg_catalog.regexp_replace(words.lookup::text, '<(-|[0-9]+)>', '&', 'g')::pg_catalog.tsquery AS parts
        FROM words WHERE words.lookup IS NOT NULL ORDER BY words.place
    ) w CROSS JOIN LATERAL (
        SELECT {part.own_key} FROM (
            SELECT {t.key AS own_key}, CASE WHEN w.parts OPERATOR(pg_catalog.<>) w.lookup THEN d.document END AS document
            FROM {table} t CROSS JOIN LATERAL (SELECT {fulltext} AS document) d
            WHERE d.document OPERATOR(pg_catalog.@@) w.parts AND {filters}
            LIMIT {word_rows}
        ) part
        WHERE w.parts OPERATOR(pg_catalog.=) w.lookup OR part.document OPERATOR(pg_catalog.@@) w.lookup
    ) row_of
    LIMIT {most_looked_up}
), matching AS (
    SELECT {own_key} FROM holding GROUP BY {own_key} ORDER BY sum(weight) DESC, {own_key} LIMIT {word_candidates}
)

-- name: by_any_word
-- purpose: Part of hybrid if few rows match the filters: of these, the rows that contain any word of the query.
words AS MATERIALIZED (
    SELECT w.* FROM {weigh_words}({query_text}) w
), matching AS (
    SELECT {t.key AS own_key}
    FROM (SELECT pg_catalog.string_agg(words.word::text, ' | ')::pg_catalog.tsquery AS any_word FROM words) w,
         {table} t CROSS JOIN LATERAL (SELECT {fulltext} AS document) d
    WHERE d.document OPERATOR(pg_catalog.@@) w.any_word AND {filters}
    LIMIT {word_rows}
)

-- name: weighed_by_words
-- purpose: Part of hybrid: both scores of each row. A word counts by its weight and, through ts_rank, by how often and where it occurs. A code counts only if the row contains it whole; ts_rank ranks by its parts.
SELECT {t.key AS own_key}, {row_distance} AS distance,
       coalesce((
           SELECT sum(words.weight * pg_catalog.ts_rank(d.document, words.word, 1)) FROM words
           WHERE pg_catalog.numnode(words.word) OPERATOR(pg_catalog.=) 1 OR d.document OPERATOR(pg_catalog.@@) words.word
       ), 0) AS weight
FROM {with_vectors} JOIN found ON {found.own_key = t.key}
CROSS JOIN LATERAL (SELECT {fulltext} AS document OFFSET 0) d

-- name: by_words_query
-- purpose: Part of hybrid: the words half is the user's statement over an index with a ranking, such as BM25.
matching AS MATERIALIZED (
    SELECT {best.own_key}, best.score::double precision AS weight FROM (
        {words_query}
    ) best ({own_key}, score)
    ORDER BY best.score DESC, {best.own_key} LIMIT {word_candidates}
)

-- name: found_by_words_query
-- purpose: That statement as a condition on a row, for preflight to plan.
EXISTS (
    SELECT FROM (
        {words_query}
    ) best ({own_key}, score)
    WHERE {best.own_key = t.key} AND best.score::double precision IS NOT NULL
)

-- name: weighed_by_words_query
-- purpose: Part of hybrid: both scores of each row. A row that the statement did not find scores 0, or the statement's lowest score if that is less.
SELECT {t.key AS own_key}, {row_distance} AS distance,
       coalesce(matching.weight, (SELECT least(0, min(matching.weight)) FROM matching), 0) AS weight
FROM {with_vectors} JOIN found ON {found.own_key = t.key}
LEFT JOIN matching ON {matching.own_key = t.key}

-- name: fulltext
-- purpose: The words half of hybrid alone, without filters.
WITH {words_half}, found AS (
    SELECT {own_key} FROM matching
), weighed AS (
    {weighed}
)
SELECT {own_key}, weight AS score FROM weighed ORDER BY weight DESC, {own_key} LIMIT {k};

-- name: any_word
-- purpose: Rows with any word of the query, best rank first: the statement that the index on the tsvector must serve.
SELECT {t.key AS own_key}, ts_rank(d.document, w.any_word, 1) AS score
FROM {table} t CROSS JOIN LATERAL (SELECT {fulltext} AS document) d,
     (SELECT replace(plainto_tsquery({fulltext_config}, %(query)s)::text, ' & ', ' | ')::tsquery AS any_word) w
WHERE d.document @@ w.any_word
ORDER BY score DESC, {t.key}
LIMIT %(k)s;
