-- The ledger: one append-only table in a schema of its own. Each row carries the hash of the row before it.

-- name: create_schema
-- purpose: Create the runbook's own schema, separate from the application's objects.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE SCHEMA IF NOT EXISTS {ledger};

-- name: create_entry
-- purpose: Create the ledger's table of everything that was done and proved.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE TABLE IF NOT EXISTS {entry} (
    seq           bigint PRIMARY KEY,
    target        text NOT NULL,
    run_id        text NOT NULL,
    phase         text NOT NULL,
    kind          text NOT NULL,
    written_at    timestamptz NOT NULL,
    written_by    text NOT NULL,
    body          jsonb NOT NULL,
    previous_hash text NOT NULL,
    hash          text NOT NULL,
    by_owner      boolean
);

-- name: add_by_owner
-- purpose: Bring a ledger of an earlier release up to date: each row says whether its owner's role wrote it.
-- lock: ACCESS EXCLUSIVE on the runbook's own table, for milliseconds
-- undo: ledger.drop_schema
ALTER TABLE {entry} ADD COLUMN IF NOT EXISTS by_owner boolean;

-- name: create_chain_lock
-- purpose: Create a table that holds nothing: its lock is the turn to write, and only the ledger's owner can take it.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE TABLE IF NOT EXISTS {chain_lock} ();

-- name: create_claims
-- purpose: Create the table of who works on which target and table; only the ledger's owner can write or read it.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE TABLE IF NOT EXISTS {claims} (
    subject     text PRIMARY KEY,
    lock_key    bigint NOT NULL,
    pid         integer NOT NULL,
    claimed_by  text NOT NULL,
    application text NOT NULL,
    claimed_at  timestamptz NOT NULL
);

-- name: create_chain_function
-- purpose: Number each new row and chain it to the one before it; refuse every other change, and other writers.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE OR REPLACE FUNCTION {ledger}.chain_entry() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '10s' AS $$
DECLARE
    last record;
    owner oid;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        RAISE EXCEPTION 'the ledger is append-only: %% on %%.%% refused', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME;
    END IF;
    SELECT c.relowner INTO owner FROM pg_class c WHERE c.oid = TG_RELID;
    NEW.by_owner := pg_has_role(session_user, owner, 'MEMBER');
    -- Not by a grant alone: a row opens phases and seals records. Only sign_off() runs with the owner's rights.
    IF NOT NEW.by_owner AND NOT (NEW.kind = 'approval' AND pg_has_role(current_user, owner, 'MEMBER')) THEN
        RAISE insufficient_privilege USING MESSAGE = format(
            'the ledger takes rows from its owner %%s alone: %%s is not a member of it; sign-offs go through %%I.sign_off()',
            owner::regrole, session_user, TG_TABLE_SCHEMA);
    END IF;
    -- One writer at a time, so that each row's predecessor is settled when the row is hashed. Not an advisory lock,
    -- which every role that can connect may hold.
    LOCK TABLE {chain_lock} IN EXCLUSIVE MODE;
    SELECT e.seq, e.hash INTO last FROM {entry} e ORDER BY e.seq DESC LIMIT 1;
    NEW.seq := coalesce(last.seq, 0) + 1;
    NEW.written_at := clock_timestamp();
    NEW.written_by := session_user;
    NEW.previous_hash := coalesce(last.hash, '');
    -- concat_ws leaves NULL out, so that the hashes of rows without by_owner still fit.
    NEW.hash := encode(sha256(convert_to(concat_ws(E'\x1f',
        NEW.previous_hash, NEW.seq, NEW.target, NEW.run_id, NEW.phase, NEW.kind,
        to_char(NEW.written_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'), NEW.written_by, NEW.body,
        NEW.by_owner
    ), 'UTF8')), 'hex');
    RETURN NEW;
END
$$;

-- name: create_chain_triggers
-- purpose: Let the chain function guard the table.
-- lock: none on the target
-- undo: ledger.drop_schema
DROP TRIGGER IF EXISTS chain ON {entry};
DROP TRIGGER IF EXISTS keep ON {entry};
CREATE TRIGGER chain BEFORE INSERT OR UPDATE OR DELETE ON {entry}
    FOR EACH ROW EXECUTE FUNCTION {ledger}.chain_entry();
CREATE TRIGGER keep BEFORE TRUNCATE ON {entry}
    FOR EACH STATEMENT EXECUTE FUNCTION {ledger}.chain_entry();

-- name: create_sign_off
-- purpose: Create the function through which a second person signs off; it writes only sign-offs.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE OR REPLACE FUNCTION {ledger}.sign_off(request bigint, bound jsonb, reason text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    asked record;
    signed bigint;
BEGIN
    SELECT e.target, e.phase, e.body, e.written_by INTO asked FROM {entry} e
    WHERE e.seq = sign_off.request AND e.kind = 'request' AND e.by_owner
      AND NOT EXISTS (SELECT FROM {entry} later WHERE later.target = e.target AND later.phase = e.phase
                      AND later.kind = 'request' AND later.by_owner AND later.seq > e.seq);
    IF asked.target IS NULL THEN
        RAISE EXCEPTION 'row %% of the ledger asks for no sign-off, or a newer one does', sign_off.request;
    ELSIF asked.written_by = session_user THEN
        RAISE insufficient_privilege USING MESSAGE = format('%%s asked for this sign-off', session_user);
    ELSIF sign_off.bound IS DISTINCT FROM asked.body - 'plan' THEN
        RAISE EXCEPTION 'row %% of the ledger asks for the sign-off of something else', sign_off.request;
    ELSIF length(sign_off.reason) > 1000 THEN
        RAISE EXCEPTION 'the reason has %% characters, more than 1000', length(sign_off.reason);
    END IF;
    INSERT INTO {entry} (target, run_id, phase, kind, body)
    VALUES (asked.target, 'approval-of-row-' || sign_off.request, asked.phase, 'approval',
            sign_off.bound || jsonb_build_object('request', sign_off.request, 'reason', coalesce(sign_off.reason, '')))
    RETURNING seq INTO signed;
    RETURN signed;
END
$$;

-- name: sign_off
-- purpose: Sign what row ``request`` of the ledger asks for.
SELECT {ledger}.sign_off(%(request)s::bigint, %(bound)s::jsonb, %(reason)s::text) AS row;

-- name: append
-- purpose: Append one row; number, time, writer and hashes come from the server.
INSERT INTO {entry} (target, run_id, phase, kind, body)
VALUES (%(target)s, %(run_id)s, %(phase)s, %(kind)s, %(body)s)
RETURNING seq, hash;

-- name: schema_exists
-- purpose: Is the runbook's schema there?
SELECT to_regnamespace(%(schema)s) IS NOT NULL AS there;

-- name: exists
-- purpose: Is there a ledger in this database, and one of this release? Is this a standby?
SELECT c.oid IS NOT NULL AS there, pg_catalog.pg_is_in_recovery() AS is_standby,
    EXISTS (SELECT FROM pg_catalog.pg_attribute a
            WHERE a.attrelid = c.oid AND a.attname = 'by_owner' AND NOT a.attisdropped) AS is_up_to_date
FROM (SELECT pg_catalog.to_regclass(%(entry)s)::pg_catalog.oid AS oid) AS c;

-- name: strangers
-- purpose: Who else owns something in the ledger's schema: neither this role, nor one that it is a member of, nor one
-- that could change the table or the database anyway. A superuser is a member of none by that alone.
WITH RECURSIVE mine AS (
    SELECT r.oid FROM pg_catalog.pg_roles r WHERE r.rolname IN (current_user, session_user)
    UNION SELECT m.roleid FROM mine JOIN pg_catalog.pg_auth_members m ON m.member = mine.oid
), schema AS (
    SELECT n.oid, n.nspowner FROM pg_catalog.pg_namespace n WHERE n.nspname = %(schema)s
), owned AS (
    SELECT nspowner AS owner, 'the schema' AS what FROM schema
    UNION SELECT c.relowner, c.relname::text FROM schema JOIN pg_catalog.pg_class c ON c.relnamespace = schema.oid
        AND c.relkind NOT IN ('i', 'I', 't')
    UNION SELECT p.proowner, p.proname || '()' FROM schema JOIN pg_catalog.pg_proc p ON p.pronamespace = schema.oid
    UNION SELECT t.typowner, t.typname::text FROM schema JOIN pg_catalog.pg_type t ON t.typnamespace = schema.oid
        AND t.typrelid = 0 AND t.typelem = 0
)
SELECT r.rolname::text AS owner, pg_catalog.string_agg(o.what, ', ' ORDER BY o.what) AS what
FROM owned o JOIN pg_catalog.pg_roles r ON r.oid = o.owner
WHERE NOT r.rolsuper AND o.owner NOT IN (SELECT mine.oid FROM mine)
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c
                  WHERE c.oid = pg_catalog.to_regclass(%(table)s) AND pg_catalog.pg_has_role(r.oid, c.relowner, 'MEMBER'))
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_database d
                  WHERE d.datname = current_database() AND pg_catalog.pg_has_role(r.oid, d.datdba, 'MEMBER'))
GROUP BY 1 ORDER BY 1;

-- name: writer
-- purpose: Who owns the ledger, and whether this session's role may write it; read from the catalogue, which needs no privilege.
SELECT pg_catalog.pg_get_userbyid(c.relowner) AS owner, session_user::text AS session_user,
    pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(c.relowner)) AS quoted_owner,
    pg_catalog.quote_ident(session_user::text) AS quoted_session_user,
    pg_catalog.pg_has_role(session_user, c.relowner, 'MEMBER') AS is_member
FROM pg_catalog.pg_class c WHERE c.oid = pg_catalog.to_regclass(%(entry)s);

-- name: who_writes
-- purpose: The session whose turn it is to write the ledger.
SELECT a.pid, a.usename, a.application_name, a.state
FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)
WHERE l.granted AND l.relation = pg_catalog.to_regclass(%(chain_lock)s);

-- name: rows_of_others
-- purpose: Rows not written by the ledger's owner, other than sign-offs.
SELECT e.seq, e.kind, e.phase, e.target, e.run_id, e.written_by FROM {entry} e
WHERE e.kind <> 'approval' AND e.seq NOT IN (SELECT c.seq FROM {counted} c) ORDER BY e.seq;

-- name: latest
-- purpose: The newest row of a kind for this target, in one phase or (NULL) in any.
SELECT e.* FROM {counted} e
WHERE e.target = {target_name} AND e.kind = %(kind)s AND (%(phases)s::text[] IS NULL OR e.phase = ANY (%(phases)s))
ORDER BY e.seq DESC LIMIT 1;

-- name: latest_standing
-- purpose: The newest row of a kind for this target, unless one of these phases was rolled back since.
SELECT e.* FROM {counted} e
WHERE e.target = {target_name} AND e.kind = %(kind)s AND NOT EXISTS (
    SELECT FROM {counted} later
    WHERE later.target = {target_name} AND later.phase = ANY (%(phases)s) AND later.kind = 'phase'
      AND later.body ->> 'verdict' = 'UNDONE' AND later.seq > e.seq)
ORDER BY e.seq DESC LIMIT 1;

-- name: last_row
-- purpose: The newest row that a phase or an operation has written for this target, whatever its kind.
SELECT e.* FROM {counted} e
WHERE e.target = {target_name} AND e.phase = ANY (%(phases)s)
ORDER BY e.seq DESC LIMIT 1;

-- name: entries
-- purpose: The rows that count of a run, or (NULL) of every run of this target, in order, and its sign-offs.
SELECT e.* FROM {entry} e
WHERE e.target = {target_name} AND (%(run_id)s::text IS NULL OR e.run_id = %(run_id)s)
  AND (e.kind = 'approval' OR e.seq IN (SELECT c.seq FROM {counted} c))
ORDER BY e.seq;

-- name: all_entries
-- purpose: All rows of a run or (NULL) of every run of this target, in order, whoever wrote them.
SELECT e.* FROM {entry} e
WHERE e.target = {target_name} AND (%(run_id)s::text IS NULL OR e.run_id = %(run_id)s)
ORDER BY e.seq;

-- name: chain
-- purpose: The whole chain as it was hashed, for checking it outside the database.
SELECT seq, previous_hash, hash, phase, kind, run_id, pg_catalog.concat_ws(E'\x1f',
    seq, target, run_id, phase, kind,
    pg_catalog.to_char(written_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'), written_by, body, by_owner) AS hashed_text
FROM {entry} ORDER BY seq;

-- name: drop_schema
-- purpose: Remove the ledger with all its records.
-- lock: ACCESS EXCLUSIVE on the runbook's own objects
-- undo: none; the records are gone
DROP SCHEMA IF EXISTS {ledger} CASCADE;
