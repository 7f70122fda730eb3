-- How common each word of the table is, and the weights of a query's words.

-- name: create_tables
-- purpose: Create the tables of word frequencies and of hybrid's weights; only their owner reads them.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE TABLE IF NOT EXISTS {words} (
    target text NOT NULL,
    lexeme text NOT NULL,
    rows   bigint NOT NULL,
    PRIMARY KEY (target, lexeme)
);
CREATE TABLE IF NOT EXISTS {hybrid} (
    target        text PRIMARY KEY,
    -- Rows of the table when its words were counted; NULL before that.
    rows          bigint,
    counted_at    timestamptz,
    -- Weight of the vectors, from 0 to 1, as learned by 70_tune; NULL means half.
    vector_weight double precision CHECK (vector_weight BETWEEN 0 AND 1)
);

-- name: weigh_words
-- purpose: Part of the hybrid route: the words of a query, rarest first, each with its weight and the tsquery that finds its rows.
-- The caller learns how common the words of the query are, but cannot read the table of words or any row.
CREATE OR REPLACE FUNCTION {weigh_words}({arguments})
RETURNS TABLE ({results})
LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 20 SET search_path = pg_catalog, pg_temp AS $runbook$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH known AS (
        SELECT max(h.rows)::float8 AS rows FROM {hybrid} h WHERE h.target = {target_name}
    ), codes AS (
        -- The text search parser splits a code into parts that may be common; the whole code is rare.
        SELECT DISTINCT phraseto_tsquery({fulltext_config}, found.code[1]) AS phrase,
               found.code[1] ~ '[[:alpha:]]' AS is_no_number
        FROM regexp_matches(query_text, {code}, 'g') found (code)
    ), lexemes AS (
        SELECT a.lexeme, array_to_tsvector(ARRAY[a.lexeme])::text::tsquery AS word
        FROM unnest(tsvector_to_array(to_tsvector({fulltext_config}, query_text))) a (lexeme)
    ), asked AS (
        SELECT l.word, coalesce(w.rows, 1)::float8 AS rows,
               CASE WHEN l.word IN (SELECT c.phrase FROM codes c WHERE c.is_no_number) THEN {code_factor} ELSE 1 END
                   AS factor
        FROM lexemes l LEFT JOIN {words} w ON w.target = {target_name} AND w.lexeme = l.lexeme
        UNION ALL
        SELECT DISTINCT c.phrase, 1, {code_factor} FROM codes c WHERE numnode(c.phrase) > 1
    ), ranked AS (
        SELECT a.*, row_number() OVER rarest AS place, sum(a.rows) OVER rarest AS up_to
        FROM asked a WINDOW rarest AS (ORDER BY a.rows, a.word::text)
    ), rare AS (
        -- The rarest word is looked up however common it is.
        SELECT string_agg(r.word::text, ' | ')::tsquery AS any_word, sum(r.rows) AS rows, count(*) AS n
        FROM ranked r WHERE r.up_to <= {word_rows} OR r.place = 1
    )
    SELECT r.place, r.word,
           -- The weight of BM25 (Robertson and Zaragoza 2009, 3.8); equal weights before the words were counted.
           r.factor * CASE WHEN known.rows IS NULL THEN 1
                           ELSE ln(1 + (greatest(known.rows - r.rows, 0) + 0.5) / (r.rows + 0.5)) END,
           CASE WHEN r.place <= rare.n THEN r.word
                -- Common words only in rows with a rare one, and only as many look-ups as double the cost.
                WHEN (r.place - rare.n) * rare.rows <= {most_looked_up} THEN rare.any_word && r.word END
    FROM ranked r, rare, known
    ORDER BY r.place;
END
$runbook$;

-- name: vector_weight
-- purpose: Part of the hybrid route: the weight of the vectors, as learned from judged queries.
CREATE OR REPLACE FUNCTION {vector_weight}(otherwise double precision)
RETURNS double precision
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $runbook$
BEGIN
    RETURN coalesce((SELECT h.vector_weight FROM {hybrid} h WHERE h.target = {target_name}), otherwise);
END
$runbook$;

-- name: count
-- purpose: Count how many rows contain each word, in a sample of the table's pages; words found in only one row are left out.
-- lock: ACCESS SHARE on {table} while it is read; rows of the tables of words
-- undo: words.forget
SELECT set_config('search_path', {path}, true);
-- The row stays locked until the end, so that two counts run one after the other.
INSERT INTO {hybrid} (target, rows, counted_at) VALUES ({target_name}, {rows}, now())
ON CONFLICT (target) DO UPDATE SET rows = excluded.rows, counted_at = excluded.counted_at;
DELETE FROM {words} WHERE target = {target_name};
INSERT INTO {words} (target, lexeme, rows)
SELECT {target_name}, s.word, ceil(s.ndoc * {times})
FROM ts_stat({documents}) s WHERE s.ndoc >= {least_rows};
-- The estimate of the rows may date from before most of them were inserted.
UPDATE {hybrid} h SET rows = greatest(h.rows, (SELECT max(w.rows) FROM {words} w WHERE w.target = h.target))
WHERE h.target = {target_name};

-- name: documents
-- purpose: Part of words.count: the tsvectors to count.
SELECT {fulltext} FROM {table} t{sample}

-- name: forget
-- purpose: Forget this target's word frequencies and hybrid weights.
-- lock: rows of the tables of words
-- undo: words.count
DELETE FROM {words} WHERE target = {target_name};
DELETE FROM {hybrid} WHERE target = {target_name};

-- name: tables_are_there
-- purpose: Do the tables of words exist?
SELECT to_regclass(%(words)s) IS NOT NULL AND to_regclass(%(hybrid)s) IS NOT NULL AS there;

-- name: counted
-- purpose: When this target's words were counted, over how many rows, and the weight of the vectors.
SELECT h.rows, h.counted_at, h.vector_weight, extract(epoch FROM now() - h.counted_at)::float8 AS age_s
FROM {hybrid} h WHERE h.target = {target_name};

-- name: learn_weight
-- purpose: Store the weight of the vectors that was learned from judged queries; NULL for equal weights.
-- lock: one row of the table of weights
-- undo: words.learn_weight with NULL
INSERT INTO {hybrid} (target, vector_weight) VALUES ({target_name}, %(vector_weight)s)
ON CONFLICT (target) DO UPDATE SET vector_weight = excluded.vector_weight;
