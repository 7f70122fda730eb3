-- Values for measuring conditions. {relation} and {column} are as the condition names them.

-- name: rows_of
-- purpose: Rows of a table that a condition reads, as last analyzed; 0 if it cannot be sampled.
SELECT coalesce(max(c.reltuples) FILTER (WHERE c.relkind IN ('r', 'm')), 0) AS rows
FROM pg_class c WHERE c.oid = to_regclass(%(relation)s);

-- name: cuts
-- purpose: The values of an ordered column at these shares of its rows.
SELECT (percentile_disc(%(cuts)s::double precision[]) WITHIN GROUP (ORDER BY {column}))::{type}[]::text[] AS values
FROM (SELECT * FROM {relation} t {sampled} LIMIT %(rows)s) t;

-- name: frequencies
-- purpose: A few values of a column for each frequency, rarest first; frequencies are grouped by powers of two.
WITH counted AS (
    SELECT {column} AS value, count(*) AS n FROM (SELECT * FROM {relation} t {sampled} LIMIT %(rows)s) t
    WHERE {column} IS NOT NULL GROUP BY 1
), placed AS (
    SELECT value, n, row_number() OVER (PARTITION BY floor(log(2, n)) ORDER BY md5(value::text)) AS place FROM counted
)
SELECT value::{of_one}::text AS value FROM placed WHERE place <= %(most)s ORDER BY n, value::text;

-- name: elements
-- purpose: The same for the elements of an array.
WITH counted AS (
    SELECT e.value, count(*) AS n FROM (SELECT * FROM {relation} t {sampled} LIMIT %(rows)s) t, unnest({column}) AS e (value)
    WHERE e.value IS NOT NULL GROUP BY 1
), placed AS (
    SELECT value, n, row_number() OVER (PARTITION BY floor(log(2, n)) ORDER BY md5(value::text)) AS place FROM counted
)
SELECT value::{of_one}::text AS value FROM placed WHERE place <= %(most)s ORDER BY n, value::text;

-- name: any_row
-- purpose: Does any row with a vector match these filters?
SELECT EXISTS (SELECT 1 FROM {from_vectors} WHERE {filters} AND {row_embedding} IS NOT NULL) AS there;
