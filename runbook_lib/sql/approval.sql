-- Sign-off: what was asked for, what it rests on, and who may give it.

-- name: rights
-- purpose: What the approver may do with the ledger; read from the catalogue, which needs no privilege.
SELECT session_user::text AS session_user,
       c.oid IS NOT NULL AS there,
       coalesce(has_schema_privilege(n.oid, 'USAGE'), false) AS "USAGE",
       coalesce(has_table_privilege(c.oid, 'SELECT'), false) AS "SELECT",
       coalesce(has_function_privilege(f.oid, 'EXECUTE'), false) AS "EXECUTE"
FROM (SELECT 1) AS one
LEFT JOIN pg_namespace n ON n.nspname = %(schema)s
LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = 'entry'
LEFT JOIN pg_proc f ON f.pronamespace = n.oid AND f.proname = 'sign_off' AND c.oid IS NOT NULL;

-- name: session_user
-- purpose: The session user, whatever SET ROLE says.
SELECT session_user::text AS name;

-- name: newest
-- purpose: The newest request for a phase's sign-off by the ledger's owner, or the newest sign-off by anybody.
SELECT seq, run_id, written_by, written_at, body FROM {entry} e
WHERE target = {target_name} AND phase = ANY (%(phases)s) AND kind = %(kind)s
  AND (kind = 'approval' AND by_owner IS NOT NULL OR by_owner)
ORDER BY seq DESC LIMIT 1;

-- name: evidence
-- purpose: The newest row that a sign-off rests on; its hash covers every row before it.
SELECT seq, hash, phase, kind FROM {counted} e
WHERE target = {target_name}
  AND (phase = ANY (%(before)s) AND kind <> 'notebook'
       OR phase = ANY (%(phases)s) AND kind = 'phase' AND body ->> 'verdict' = ANY (%(used_up)s))
ORDER BY seq DESC LIMIT 1;

-- name: proved_by
-- purpose: Who wrote the newest verdict of each phase that a sign-off rests on.
SELECT DISTINCT ON (phase) phase, body ->> 'verdict' AS verdict, written_by, written_at, run_id FROM {counted} e
WHERE target = {target_name} AND phase = ANY (%(before)s) AND kind = 'phase'
ORDER BY phase, seq DESC;

-- name: gates
-- purpose: The newest verdict of each gate of these phases, in their order.
SELECT phase, name, verdict, subject, found FROM (
    SELECT DISTINCT ON (phase, body ->> 'name', body ->> 'subject') seq, phase, body ->> 'name' AS name,
           body ->> 'verdict' AS verdict, body ->> 'subject' AS subject, body ->> 'found' AS found
    FROM {counted} e
    WHERE target = {target_name} AND phase = ANY (%(before)s) AND kind = 'gate'
    ORDER BY phase, body ->> 'name', body ->> 'subject', seq DESC
) AS newest
ORDER BY phase, seq;
