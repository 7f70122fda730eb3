-- The ledger: one append-only table in a schema of its own. Each row carries the hash of the row before it.

-- name: create_schema
-- purpose: Make the runbook's own schema, apart from the application's objects.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE SCHEMA IF NOT EXISTS {ledger};

-- name: create_entry
-- purpose: Make the table of everything that was done and proved.
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
    hash          text NOT NULL
);

-- name: create_chain_function
-- purpose: Number each new row and chain it to the one before it; refuse every other change.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE OR REPLACE FUNCTION {ledger}.chain_entry() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    last record;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        RAISE EXCEPTION 'the ledger is append-only: %% on %%.%% refused', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME;
    END IF;
    -- One writer at a time, so that each row's predecessor is settled when the row is hashed.
    PERFORM pg_advisory_xact_lock(hashtextextended('runbook ledger ' || TG_TABLE_SCHEMA, 0));
    SELECT e.seq, e.hash INTO last FROM {entry} e ORDER BY e.seq DESC LIMIT 1;
    NEW.seq := coalesce(last.seq, 0) + 1;
    NEW.written_at := clock_timestamp();
    NEW.written_by := session_user;
    NEW.previous_hash := coalesce(last.hash, '');
    NEW.hash := encode(sha256(convert_to(concat_ws(E'\x1f',
        NEW.previous_hash, NEW.seq, NEW.target, NEW.run_id, NEW.phase, NEW.kind,
        to_char(NEW.written_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'), NEW.written_by, NEW.body
    ), 'UTF8')), 'hex');
    RETURN NEW;
END
$$;

-- name: create_chain_triggers
-- purpose: Let the chain function guard the table.
-- lock: none on the target
-- undo: ledger.drop_schema
CREATE TRIGGER chain BEFORE INSERT OR UPDATE OR DELETE ON {entry}
    FOR EACH ROW EXECUTE FUNCTION {ledger}.chain_entry();
CREATE TRIGGER keep BEFORE TRUNCATE ON {entry}
    FOR EACH STATEMENT EXECUTE FUNCTION {ledger}.chain_entry();

-- name: append
-- purpose: Append one row; number, time, writer and hashes come from the server.
INSERT INTO {entry} (target, run_id, phase, kind, body)
VALUES (%(target)s, %(run_id)s, %(phase)s, %(kind)s, %(body)s)
RETURNING seq, hash;

-- name: schema_exists
-- purpose: Is the runbook's schema there?
SELECT to_regnamespace(%(schema)s) IS NOT NULL AS there;

-- name: exists
-- purpose: Is there a ledger in this database?
SELECT to_regclass(%(entry)s) IS NOT NULL AS there;

-- name: latest
-- purpose: The newest row of a kind for this target, in one phase or (NULL) in any.
SELECT * FROM {entry}
WHERE target = {target_name} AND kind = %(kind)s AND (%(phase)s::text IS NULL OR phase = %(phase)s)
ORDER BY seq DESC LIMIT 1;

-- name: latest_standing
-- purpose: The newest row of a kind for this target, unless one of these phases was taken back since.
SELECT * FROM {entry} e
WHERE target = {target_name} AND kind = %(kind)s AND NOT EXISTS (
    SELECT FROM {entry} later
    WHERE later.target = {target_name} AND later.phase = ANY (%(phases)s) AND later.kind = 'phase'
      AND later.body ->> 'verdict' = 'UNDONE' AND later.seq > e.seq)
ORDER BY seq DESC LIMIT 1;

-- name: last_row
-- purpose: The newest row that a phase or an operation has written for this target, whatever its kind.
SELECT * FROM {entry}
WHERE target = {target_name} AND phase = %(phase)s
ORDER BY seq DESC LIMIT 1;

-- name: entries
-- purpose: All rows of a run or (NULL) of every run of this target, in order.
SELECT * FROM {entry}
WHERE target = {target_name} AND (%(run_id)s::text IS NULL OR run_id = %(run_id)s)
ORDER BY seq;

-- name: chain
-- purpose: The whole chain as it was hashed, for checking it outside the database.
SELECT seq, previous_hash, hash, phase, kind, run_id, concat_ws(E'\x1f',
    seq, target, run_id, phase, kind,
    to_char(written_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'), written_by, body) AS hashed_text
FROM {entry} ORDER BY seq;

-- name: drop_schema
-- purpose: Remove the ledger with all its records.
-- lock: ACCESS EXCLUSIVE on the runbook's own objects
-- undo: none; the records are gone
DROP SCHEMA IF EXISTS {ledger} CASCADE;
