-- Reads only: what a consent of the params file can name.

-- name: names
-- purpose: Names of the triggers and rules of the table, its partitions and its children; all publications and schemas.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT
    ARRAY(SELECT DISTINCT g.tgname::text FROM pg_trigger g
          WHERE g.tgrelid IN (SELECT oid FROM part) AND NOT g.tgisinternal ORDER BY 1) AS triggers,
    ARRAY(SELECT DISTINCT r.rulename::text FROM pg_rewrite r
          WHERE r.ev_class IN (SELECT oid FROM part) AND r.rulename <> '_RETURN' ORDER BY 1) AS rules,
    ARRAY(SELECT p.pubname::text FROM pg_publication p ORDER BY 1) AS publications,
    ARRAY(SELECT n.nspname::text FROM pg_namespace n ORDER BY 1) AS open_schemas;
