-- Phase 50: the ranges that workers on one or many machines share, and the row by which a DBA steers them.

-- name: create_windows
-- purpose: Create the list of batch ranges, for workers to claim.
-- lock: ACCESS SHARE on {table}
-- undo: windows.drop
CREATE TABLE IF NOT EXISTS {window} AS
    SELECT {one t.key AS after_key}, {one t.key AS to_key} FROM {table} t WITH NO DATA;
ALTER TABLE {window}
    ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    ADD COLUMN part text NOT NULL,
    ADD COLUMN from_block bigint,
    ADD COLUMN to_block bigint,
    ADD COLUMN claimed_by text,
    ADD COLUMN claimed_pid integer,
    ADD COLUMN claimed_session timestamptz,
    ADD COLUMN seen_at timestamptz,
    ADD COLUMN claims integer NOT NULL DEFAULT 0,
    ADD COLUMN rows bigint NOT NULL DEFAULT 0,
    ADD COLUMN done_at timestamptz;

-- name: create_control
-- purpose: Create the row with which a DBA pauses or slows the backfill.
-- lock: none on the target
-- undo: windows.drop
CREATE TABLE IF NOT EXISTS {control} (
    target                   text PRIMARY KEY,
    pause                    boolean NOT NULL DEFAULT false,
    reason                   text NOT NULL DEFAULT '',
    most_batch_rows          integer CHECK (most_batch_rows > 0),
    pause_between_batches_ms integer CHECK (pause_between_batches_ms >= 0)
);
INSERT INTO {control} (target) VALUES ({target_name}) ON CONFLICT DO NOTHING;

-- name: drop
-- purpose: Remove the ranges and this target's row of control.
-- lock: none on the target
-- undo: windows.create_windows
DROP TABLE IF EXISTS {window};

-- name: drop_control
-- purpose: Remove this target's row of control.
-- lock: none on the target
-- undo: windows.create_control
DELETE FROM {control} WHERE target = {target_name};

-- name: state
-- purpose: How many ranges there are, and how many of them are still to be done.
SELECT count(*) AS windows, count(*) FILTER (WHERE done_at IS NULL) AS left,
       count(*) FILTER (WHERE claims > 1) AS taken_over, count(DISTINCT claimed_by) AS workers,
       coalesce(sum(rows), 0)::bigint AS rows
FROM {window};

-- name: forget
-- purpose: Forget the ranges of an earlier round.
TRUNCATE {window};

-- name: cut_blocks
-- purpose: Cut the heap of the table, or of one partition, into ranges of blocks.
INSERT INTO {window} (part, from_block, to_block)
SELECT %(part)s, b, b + %(blocks)s
FROM generate_series(0, greatest(pg_relation_size(to_regclass(%(part)s)) / current_setting('block_size')::int - 1, 0),
                     %(blocks)s) b;

-- name: cut_keys
-- purpose: Cut the staged keys into ranges of the same number of rows; by their order alone, since not every type has a max().
INSERT INTO {window} (part, after_key, to_key)
SELECT %(part)s, lag(ends.key) OVER (ORDER BY ends.n), ends.key FROM (
    SELECT {one s.own_key AS key}, row_number() OVER in_order AS n, lead(true) OVER in_order IS NULL AS is_last
    FROM {staged} s WINDOW in_order AS (ORDER BY {s.own_key})
) ends WHERE ends.n %% %(rows)s = 0 OR ends.is_last ORDER BY ends.n;

-- name: claim
-- purpose: Claim the next range that is free, or whose worker is gone or has been silent for the lease.
UPDATE {window} w
SET claimed_by = %(worker)s, claimed_pid = pg_backend_pid(), seen_at = clock_timestamp(), claims = w.claims + 1,
    claimed_session = (SELECT a.backend_start FROM pg_stat_activity a WHERE a.pid = pg_backend_pid())
WHERE w.id = (
    SELECT o.id FROM {window} o
    WHERE o.done_at IS NULL AND (
        o.claimed_by IS NULL
        OR o.seen_at NOT BETWEEN clock_timestamp() - make_interval(secs => %(lease_s)s) AND clock_timestamp()
        OR NOT EXISTS (SELECT FROM pg_stat_activity a
                       WHERE a.pid = o.claimed_pid AND a.backend_start = o.claimed_session)
    )
    ORDER BY o.id LIMIT 1 FOR UPDATE SKIP LOCKED
) RETURNING w.id, w.part, w.from_block, w.to_block, w.after_key, w.to_key, w.claims;

-- name: seen
-- purpose: Report that the worker is alive, and what it has done; no row if the range was taken over.
UPDATE {window} SET seen_at = clock_timestamp(), rows = rows + %(rows)s
WHERE id = %(id)s AND claimed_by = %(worker)s AND done_at IS NULL RETURNING id;

-- name: done
-- purpose: Close a range; no row if it was taken over.
UPDATE {window} SET seen_at = clock_timestamp(), rows = rows + %(rows)s, done_at = clock_timestamp()
WHERE id = %(id)s AND claimed_by = %(worker)s AND done_at IS NULL RETURNING id;

-- name: workers
-- purpose: Sessions that hold a range.
SELECT claimed_pid AS pid FROM {window} WHERE done_at IS NULL AND claimed_pid IS NOT NULL;

-- name: relations
-- purpose: The table, or each leaf of a partitioned one, with the figures that the choice of a strategy needs.
WITH leaf AS (
    SELECT c.oid FROM pg_class c WHERE c.oid = to_regclass(%(table)s) AND c.relkind = 'r'
    UNION SELECT p.relid FROM pg_partition_tree(to_regclass(%(table)s)) p JOIN pg_class c ON c.oid = p.relid
    WHERE p.isleaf AND c.relkind = 'r'
)
SELECT format('%%I.%%I', n.nspname, c.relname) AS part,
       pg_relation_size(c.oid) / current_setting('block_size')::int AS blocks, am.amname AS access_method,
       (SELECT count(*) FROM pg_index i WHERE i.indrelid = c.oid) AS indexes,
       ARRAY(SELECT a.amname::text FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid
             JOIN pg_am a ON a.oid = ic.relam WHERE i.indrelid = c.oid AND a.amname <> 'btree' ORDER BY 1) AS slow_indexes
FROM leaf JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_am am ON am.oid = c.relam
ORDER BY c.oid;

-- name: wide_columns
-- purpose: The columns of variable length, which decide how large a row is.
SELECT attname AS name FROM pg_attribute
WHERE attrelid = to_regclass(%(table)s) AND attlen = -1 AND attnum > 0 AND NOT attisdropped
  AND attname <> ALL (%(added)s) ORDER BY attnum;

-- name: control
-- purpose: The DBA's current request to pause or slow down.
SELECT pause, reason, most_batch_rows, pause_between_batches_ms FROM {control} WHERE target = {target_name};
