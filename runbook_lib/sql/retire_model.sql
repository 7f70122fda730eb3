-- The replaced model's column and what belongs to it taken away, once no call brings its vectors any more.

-- name: searches
-- purpose: Scans of the replaced target's vector indexes since the server began to count.
SELECT coalesce((SELECT sum(pg_stat_get_numscans(o)) FROM unnest(%(oids)s::oid[]) AS o), 0)::bigint AS scans,
       extract(epoch FROM clock_timestamp())::float8 AS at_s, clock_timestamp()::text AS at;

-- name: forward
-- purpose: Let the name that the application calls answer from the new target alone.
-- lock: none on the target
-- undo: model_change.swap_back, while the copy of the former function is there
CREATE OR REPLACE FUNCTION {function}({arguments}) RETURNS {result}
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $runbook$
-- runbook hand-over from {old_name} to {new_name}: the new one answers
BEGIN
    RETURN QUERY SELECT h.* FROM {new_function}({passed}) AS h;
END
$runbook$;
