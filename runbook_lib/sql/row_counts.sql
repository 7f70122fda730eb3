-- How many rows there are, asked in one way wherever it is asked.

-- name: estimated
-- purpose: Rows of a relation by the planner's estimate, partitions added up; and what holds pages of which nothing
-- was estimated, since it was never analyzed, or was emptied.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(relation)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint AS rows,
       to_regclass(%(relation)s) IS NOT NULL AS there,
       coalesce(bool_or(c.reltuples > 0), false) AS analyzed,
       coalesce(array_agg(c.oid::regclass::text) FILTER (WHERE c.reltuples <= 0 AND pg_relation_size(c.oid) > 0), '{{}}')
           AS not_estimated
FROM part JOIN pg_class c USING (oid) WHERE c.relkind = 'r';

-- name: counted
-- purpose: Rows of a table, or of a partition, that was never analyzed, counted.
SELECT count(*) AS rows FROM {relation};

-- name: texts
-- purpose: Is there a row, and is there one with text?
SELECT EXISTS (SELECT 1 FROM {table}) AS rows, EXISTS (SELECT 1 FROM {table} t WHERE {has_text}) AS texts;
