-- Phase 70: which values the filters have, and how many rows each lets through.

-- name: values
-- purpose: Share of the rows by value, rarest first: every common value, and a few rare ones spread over their ranks.
-- A row that lacks one of the columns counts, and has no value; what the columns hold equal is one value.
WITH counted AS (
    SELECT CASE WHEN num_nulls({columns}) = 0 THEN {value} END AS value,
           count(*) FILTER (WHERE {always}) AS n, count(*) AS of_all
    FROM {table} t {sampled} GROUP BY {columns}
), ranked AS (
    SELECT value, n / sum(of_all) OVER ()::double precision AS share,
           row_number() OVER (PARTITION BY value IS NULL ORDER BY n, value) AS place
    FROM counted WHERE n > 0 OR value IS NULL
), rare AS (
    SELECT count(*) AS n FROM ranked WHERE share < %(rare)s AND value IS NOT NULL
)
SELECT value, share FROM ranked, rare
WHERE value IS NOT NULL AND (share >= %(rare)s OR rare.n <= %(measured)s
    OR place IN (SELECT 1 + i * (rare.n - 1) / (%(measured)s - 1) FROM generate_series(0, %(measured)s - 1) AS i))
ORDER BY share, value;

-- name: rows_as_queries
-- purpose: Vectors of rows, spread over the table, that stand in for queries.
SELECT {one t.key}::text AS key, {row_embedding} AS embedding FROM {from_vectors}
WHERE {row_embedding} IS NOT NULL ORDER BY {row_embedding_hash}, {t.key} LIMIT greatest(%(n)s, 0);

-- name: has_btree
-- purpose: Does a valid index, on all rows, start with these columns, in whatever order?
SELECT EXISTS (
    SELECT FROM pg_index i
    JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam
    WHERE i.indrelid = to_regclass(%(table)s) AND am.amname IN ('btree', 'hash')
      AND %(columns)s::text[] <@ ARRAY(
          SELECT a.attname::text FROM pg_attribute a
          WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:cardinality(%(columns)s::text[]) - 1]))
      AND i.indisvalid AND i.indpred IS NULL
) AS there;
