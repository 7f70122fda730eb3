-- A table that Citus has distributed. Checked as text and against stand-ins on one server; run on no cluster.

-- name: extension
-- purpose: The release of Citus in this database; no row where there is none.
SELECT e.extversion AS version FROM pg_extension e WHERE e.extname = 'citus';

-- name: distribution
-- purpose: How Citus has distributed the table; no row where it has not.
SELECT p.partmethod::text AS method, p.colocationid AS colocation,
       column_to_column_name(p.logicalrelid, p.partkey)::text AS column,
       (SELECT count(*) FROM pg_dist_shard s WHERE s.logicalrelid = p.logicalrelid)::int AS shards
FROM pg_dist_partition p WHERE p.logicalrelid = to_regclass(%(table)s);

-- name: nodes
-- purpose: What each worker offers of pgvector, and whether triggers may run there.
SELECT w.nodename || ':' || w.nodeport AS node, w.success, split_part(w.result, ' ', 1) AS pgvector,
       split_part(w.result, ' ', 2) AS triggers
FROM run_command_on_workers($$
    SELECT coalesce((SELECT a.default_version FROM pg_available_extensions a WHERE a.name = 'vector'), 'none') || ' '
        || coalesce(current_setting('citus.enable_unsafe_triggers', true), 'off')
$$) w ORDER BY 1;

-- name: triggers_here
-- purpose: May triggers on distributed tables be made from this server?
SELECT coalesce(current_setting('citus.enable_unsafe_triggers', true), 'off') AS triggers;

-- name: create_text_functions
-- purpose: Make text and hash of a row by functions that Citus takes in an UPDATE: concat_ws and convert_to are only STABLE.
-- lock: none on the target
-- undo: citus.drop_text_functions
CREATE OR REPLACE FUNCTION {text_function}(VARIADIC parts text[]) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT pg_catalog.array_to_string(parts, E'\n'::pg_catalog.text) $$;
CREATE OR REPLACE FUNCTION {text_hash_function}(VARIADIC parts text[]) RETURNS bytea
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT substring(pg_catalog.sha256(pg_catalog.convert_to(
        pg_catalog.array_to_string(parts, E'\n'::pg_catalog.text), 'UTF8'::pg_catalog.name)) from 1 for {hash_bytes})
$$;

-- name: drop_text_functions
-- purpose: Remove those functions.
-- lock: none on the target
-- undo: citus.create_text_functions
DROP FUNCTION IF EXISTS {text_function}(text[]);
DROP FUNCTION IF EXISTS {text_hash_function}(text[]);

-- name: create_staging
-- purpose: Create the staging table and distribute it as the table is, so that each vector lies next to its row.
-- lock: ACCESS SHARE on {table}
-- undo: schema.drop_staging
{create_staging};
SELECT create_distributed_table({staging_name}, 'key', colocate_with => {table_name});

-- name: create_rejected
-- purpose: Create the table of rejected vectors, with a copy on every node, since a rejected row may have no key.
-- lock: ACCESS SHARE on {table}
-- undo: schema.drop_staging
{create_rejected};
SELECT create_reference_table({rejected_name});

-- name: create_queue
-- purpose: Create the queue of changed rows and distribute it as the table is, so that the trigger writes on its own node.
-- lock: ACCESS SHARE on {table}
-- undo: schema.drop_queue
CREATE TABLE IF NOT EXISTS {queue} AS
    SELECT t.{key} AS key, now() AS queued_at FROM {table} t WITH NO DATA;
ALTER TABLE {queue}
    ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY,
    ADD COLUMN claimed_by bigint,
    ADD COLUMN claimed_at timestamptz,
    ADD COLUMN attempts integer NOT NULL DEFAULT 0,
    ADD COLUMN error text,
    ALTER COLUMN key SET NOT NULL,
    ALTER COLUMN queued_at SET DEFAULT clock_timestamp();
ALTER TABLE {queue} ADD PRIMARY KEY (key, id);
SELECT create_distributed_table({queue_name}, 'key', colocate_with => {table_name});

-- name: claim
-- purpose: Claim the oldest changes of those that were there when the drain began; Citus knows no SKIP LOCKED across shards, so a claim ends with its lease alone.
-- lock: ROW EXCLUSIVE on the queue, for milliseconds
-- undo: refresh.release
UPDATE {queue} SET claimed_by = %(worker)s, claimed_at = now() WHERE id IN (
    SELECT q.id FROM {queue} q
    WHERE (q.queued_at <= %(until)s OR q.queued_at > clock_timestamp()) AND q.attempts < %(tries)s AND q.id <> ALL (%(put_off)s)
      AND (q.claimed_by IS NULL OR q.claimed_at < now() - make_interval(secs => %(lease_s)s))
    ORDER BY q.id LIMIT %(batch_rows)s
) RETURNING id, key;

-- name: lock_rows
-- purpose: Which of these rows exist; Citus does not lock rows across shards, and the update compares the text's hash.
SELECT t.{key} AS key FROM {table} t WHERE t.{key} = ANY (%(keys)s);
