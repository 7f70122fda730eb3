-- Functions of one target that another target has taken over; read from their own source, which is what runs.

-- name: standing
-- purpose: The functions of this schema that forward calls from one target to another.
SELECT p.proname::text AS function, h.parts[1] AS old, h.parts[2] AS new, h.parts[3] AS who
FROM pg_proc p
CROSS JOIN LATERAL (
    SELECT regexp_match(p.prosrc, '^\s*-- runbook hand-over from (\w+) to (\w+): (both answer|the new one answers)')
) AS h (parts)
WHERE p.pronamespace = to_regnamespace(%(schema)s) AND h.parts IS NOT NULL AND {of_trusted_owner}
ORDER BY p.proname;
