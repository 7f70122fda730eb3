-- How common each word is, counted from the table, and how a query's words weigh by that.

-- name: create_tables
-- purpose: Create the tables of how common words are and of how the halves of hybrid weigh; nobody but their owner reads them.
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
    -- Of the table when its words were counted; NULL before that.
    rows          bigint,
    counted_at    timestamptz,
    -- Of the vectors' half, from 0 to 1, as 70_tune learned it; NULL for half.
    vector_weight double precision CHECK (vector_weight BETWEEN 0 AND 1)
);

-- name: weigh_words
-- purpose: Part of the hybrid route: the words of a query, rarest first, each with its weight and with what finds its rows.
-- Its caller learns how common the words that it asks for are, and reads neither the table of words nor any row.
CREATE OR REPLACE FUNCTION {weigh_words}({arguments})
RETURNS TABLE ({results})
LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 20 SET search_path = pg_catalog, pg_temp AS $runbook$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH known AS (
        SELECT max(h.rows)::float8 AS rows FROM {hybrid} h WHERE h.target = {target_name}
    ), codes AS (
        -- A code, which is what is looked for, is cut into parts that may be common; whole it is rare.
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
        -- The rarest word is looked up in any case, however common it is.
        SELECT string_agg(r.word::text, ' | ')::tsquery AS any_word, sum(r.rows) AS rows, count(*) AS n
        FROM ranked r WHERE r.up_to <= {word_rows} OR r.place = 1
    )
    SELECT r.place, r.word,
           -- As BM25 weighs them (Robertson and Zaragoza 2009, 3.8); alike before they were counted.
           r.factor * CASE WHEN known.rows IS NULL THEN 1
                           ELSE ln(1 + (greatest(known.rows - r.rows, 0) + 0.5) / (r.rows + 0.5)) END,
           CASE WHEN r.place <= rare.n THEN r.word
                -- The common ones only where a rare one is, and in so many look-ups as cost about as much again.
                WHEN (r.place - rare.n) * rare.rows <= {most_looked_up} THEN rare.any_word && r.word END
    FROM ranked r, rare, known
    ORDER BY r.place;
END
$runbook$;

-- name: vector_weight
-- purpose: Part of the hybrid route: how the vectors' half weighs, as judged queries taught it.
CREATE OR REPLACE FUNCTION {vector_weight}(otherwise double precision)
RETURNS double precision
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $runbook$
BEGIN
    RETURN coalesce((SELECT h.vector_weight FROM {hybrid} h WHERE h.target = {target_name}), otherwise);
END
$runbook$;

-- name: count
-- purpose: Count in how many rows each word stands, in a sample of the table's pages; words of fewer rows are left out.
-- lock: ACCESS SHARE on {table} while it is read; rows of the tables of words
-- undo: words.forget
SELECT set_config('search_path', {path}, true);
-- Its row is locked until the end, so that two who count do so one after the other.
INSERT INTO {hybrid} (target, rows, counted_at) VALUES ({target_name}, {rows}, now())
ON CONFLICT (target) DO UPDATE SET rows = excluded.rows, counted_at = excluded.counted_at;
DELETE FROM {words} WHERE target = {target_name};
INSERT INTO {words} (target, lexeme, rows)
SELECT {target_name}, s.word, ceil(s.ndoc * {times})
FROM ts_stat({documents}) s WHERE s.ndoc >= {least_rows};
-- The number of rows was estimated, perhaps before most of them came.
UPDATE {hybrid} h SET rows = greatest(h.rows, (SELECT max(w.rows) FROM {words} w WHERE w.target = h.target))
WHERE h.target = {target_name};

-- name: documents
-- purpose: Part of words.count: the tsvectors that are counted.
SELECT {fulltext} FROM {table} t{sample}

-- name: forget
-- purpose: Forget how common this target's words are, and how the halves of its hybrid weigh.
-- lock: rows of the tables of words
-- undo: words.count
DELETE FROM {words} WHERE target = {target_name};
DELETE FROM {hybrid} WHERE target = {target_name};

-- name: tables_are_there
-- purpose: Are the tables of words there?
SELECT to_regclass(%(words)s) IS NOT NULL AND to_regclass(%(hybrid)s) IS NOT NULL AS there;

-- name: counted
-- purpose: When this target's words were counted, of how many rows, and how the vectors' half weighs.
SELECT h.rows, h.counted_at, h.vector_weight, extract(epoch FROM now() - h.counted_at)::float8 AS age_s
FROM {hybrid} h WHERE h.target = {target_name};

-- name: learn_weight
-- purpose: Keep the weight of the vectors' half that judged queries taught; NULL for equal weights.
-- lock: one row of the table of weights
-- undo: words.learn_weight with NULL
INSERT INTO {hybrid} (target, vector_weight) VALUES ({target_name}, %(vector_weight)s)
ON CONFLICT (target) DO UPDATE SET vector_weight = excluded.vector_weight;
