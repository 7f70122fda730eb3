-- Values to measure conditions with. {relation} and {column} are as the condition names them.

-- name: rows_of
-- purpose: Rows of a table that a condition reads, as last analyzed; 0 of what no sample can be taken from.
SELECT coalesce(max(c.reltuples) FILTER (WHERE c.relkind IN ('r', 'm')), 0) AS rows
FROM pg_class c WHERE c.oid = to_regclass(%(relation)s);

-- name: cuts
-- purpose: The values that cut an ordered column at these shares of its rows.
SELECT (percentile_disc(%(cuts)s::double precision[]) WITHIN GROUP (ORDER BY {column}))::{type}[]::text[] AS values
FROM {relation} t {sampled};

-- name: frequencies
-- purpose: Values of a column, a few of each frequency, rarest first; frequencies are alike by their power of two.
WITH counted AS (
    SELECT {column} AS value, count(*) AS n FROM (SELECT * FROM {relation} t {sampled} LIMIT %(rows)s) t
    WHERE {column} IS NOT NULL GROUP BY 1
), placed AS (
    SELECT value, n, row_number() OVER (PARTITION BY floor(log(2, n)) ORDER BY md5(value::text)) AS place FROM counted
)
SELECT value::{of_one}::text AS value FROM placed WHERE place <= %(most)s ORDER BY n, value::text;

-- name: elements
-- purpose: The same of the elements of an array.
WITH counted AS (
    SELECT e.value, count(*) AS n FROM (SELECT * FROM {relation} t {sampled} LIMIT %(rows)s) t, unnest({column}) AS e (value)
    WHERE e.value IS NOT NULL GROUP BY 1
), placed AS (
    SELECT value, n, row_number() OVER (PARTITION BY floor(log(2, n)) ORDER BY md5(value::text)) AS place FROM counted
)
SELECT value::{of_one}::text AS value FROM placed WHERE place <= %(most)s ORDER BY n, value::text;

-- name: any_row
-- purpose: Do these filters let a row with a vector through?
SELECT EXISTS (SELECT FROM {from_vectors} WHERE {filters} AND {row_embedding} IS NOT NULL) AS there;
