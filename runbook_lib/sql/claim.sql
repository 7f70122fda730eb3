-- One run at a time on one target and on one table: advisory locks, which end with the session that holds them. Each
-- claim has an unguessable key, written into a table that only the ledger's owner can read.

-- name: there
-- purpose: Is there a ledger with a table of claims?
SELECT pg_catalog.to_regclass(%(claims)s) IS NOT NULL AS there;

-- name: turn
-- purpose: One claimant at a time; only the ledger's owner can take this lock.
-- lock: EXCLUSIVE on the runbook's own table, for milliseconds
-- undo: ends with its transaction
LOCK TABLE {claims} IN EXCLUSIVE MODE;

-- name: holder
-- purpose: The session that holds this claim, and where it is: the same process and role hold the key
-- of its claim.
SELECT c.pid, c.claimed_by AS usename, c.application AS application_name, c.claimed_at AS since,
    CASE WHEN a.client_port = -1 THEN 'the server''s own machine' ELSE pg_catalog.host(a.client_addr) END AS host
FROM {claims} c
JOIN pg_catalog.pg_stat_activity a ON a.pid = c.pid AND a.usename = c.claimed_by AND a.datname = current_database()
JOIN pg_catalog.pg_locks l ON l.pid = c.pid AND l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
    AND l.mode = 'ExclusiveLock' AND (l.classid::bigint << 32 | l.objid::bigint) = c.lock_key
WHERE c.subject = %(subject)s AND c.pid <> pg_catalog.pg_backend_pid();

-- name: claim
-- purpose: Claim this for the session, until it ends.
-- lock: an advisory lock
-- undo: ends with its session
INSERT INTO {claims} AS c (subject, lock_key, pid, claimed_by, application, claimed_at)
SELECT %(subject)s, %(key)s, pg_catalog.pg_backend_pid(), session_user,
       pg_catalog.current_setting('application_name'), pg_catalog.clock_timestamp()
FROM pg_catalog.pg_advisory_lock(%(key)s::bigint)
ON CONFLICT (subject) DO UPDATE SET lock_key = excluded.lock_key, pid = excluded.pid, claimed_by = excluded.claimed_by,
    application = excluded.application, claimed_at = excluded.claimed_at;

-- name: take_before_ledger
-- purpose: Claim this where there is no ledger yet; false if it is taken. Any role could hold this lock.
SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended(%(subject)s::text, 0::bigint)) AS taken;

-- name: holder_before_ledger
-- purpose: The session that has claimed this where there was no ledger yet, and whether it could have made one.
SELECT a.pid, a.usename, a.application_name, coalesce(a.backend_start, pg_catalog.now()) AS since,
    CASE WHEN a.client_port = -1 THEN 'the server''s own machine' ELSE pg_catalog.host(a.client_addr) END AS host,
    coalesce((SELECT pg_catalog.pg_has_role(a.usesysid, c.relowner, 'MEMBER') FROM pg_catalog.pg_class c
              WHERE c.oid = pg_catalog.to_regclass(%(table)s)), false) AS may_migrate
FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND a.datname = current_database() AND a.pid <> pg_catalog.pg_backend_pid()
  AND (l.classid::bigint << 32 | l.objid::bigint) = pg_catalog.hashtextextended(%(subject)s::text, 0::bigint);
