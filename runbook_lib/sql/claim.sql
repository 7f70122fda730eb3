-- One run at a time on one target: advisory locks, which end with the session that holds them.

-- name: take_target
-- purpose: Claim this target for a run, or for a notebook that is stepped through by hand; false if it is taken.
SELECT pg_try_advisory_lock(hashtextextended('runbook target ' || {target_name}, 0)) AS taken;

-- name: who_has_target
-- purpose: The session that has claimed this target.
SELECT a.pid, a.usename, a.application_name, a.backend_start
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended('runbook target ' || {target_name}, 0);

-- name: take_phase
-- purpose: Claim this target for the one notebook at work; false if another notebook is.
SELECT pg_try_advisory_lock(hashtextextended('runbook phase ' || {target_name}, 0)) AS taken;

-- name: who_has_phase
-- purpose: The session of the notebook at work.
SELECT a.pid, a.usename, a.application_name, a.backend_start
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended('runbook phase ' || {target_name}, 0);
