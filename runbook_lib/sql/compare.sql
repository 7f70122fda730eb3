-- Phase 80: what the queries are made of, and how people have judged.

-- name: words
-- purpose: The words of each text, lower-cased and otherwise as they are.
SELECT text, tsvector_to_array(to_tsvector('simple', text)) AS words FROM unnest(%(texts)s::text[]) AS text;

-- name: document_frequency
-- purpose: How many rows, of all or of a sample of pages, contain each of these words, and their share.
WITH sampled AS MATERIALIZED (
    SELECT to_tsvector('simple', left({text}, 20000)) AS words
    FROM {table} AS t TABLESAMPLE SYSTEM (%(percent)s)
)
SELECT word, count(*) AS rows, count(*)::float8 / (SELECT count(*) FROM sampled) AS share
FROM sampled, unnest(tsvector_to_array(words)) AS word
WHERE word = ANY (%(words)s) GROUP BY word;

-- name: first_words
-- purpose: How rows begin, for a person who judges answers.
SELECT {one t.key}::text AS key, left({text}, 200) AS text
FROM {table} t WHERE {one t.key}::text = ANY (%(keys)s);

-- name: some_texts
-- purpose: How the texts of some rows begin: a search for their own words should find them.
SELECT left({text}, 2000) AS text FROM {table} t WHERE {has_text} LIMIT %(rows)s;

-- name: judgements
-- purpose: The judgements given in the notebook, the newest for each query and row.
SELECT DISTINCT ON (body ->> 'query_id', body ->> 'key')
       body ->> 'query_id' AS query_id, body ->> 'key' AS key, (body ->> 'relevance')::int AS relevance
FROM {counted} e WHERE target = {target_name} AND kind = 'judgement'
ORDER BY body ->> 'query_id', body ->> 'key', seq DESC;
