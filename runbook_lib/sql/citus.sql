-- A table that Citus has distributed. Run on Citus 14.0.1 by tests/drills/test_citus.py.

-- name: extension
-- purpose: The release of Citus in this database; no row where there is none.
SELECT e.extversion AS version FROM pg_extension e WHERE e.extname = 'citus';

-- name: distribution
-- purpose: How Citus has distributed the table; no row where it has not.
SELECT p.partmethod::text AS method, p.repmodel::text AS copies, p.colocationid AS colocation,
       column_to_column_name(p.logicalrelid, p.partkey)::text AS column,
       (SELECT count(*) FROM pg_dist_shard s WHERE s.logicalrelid = p.logicalrelid)::int AS shards
FROM pg_dist_partition p WHERE p.logicalrelid = to_regclass(%(table)s);

-- name: storage
-- purpose: How the rows of the table are stored; no row where it has no storage of its own.
SELECT am.amname::text AS method FROM pg_class c JOIN pg_am am ON am.oid = c.relam WHERE c.oid = to_regclass(%(table)s);

-- name: nodes
-- purpose: What each worker offers of pgvector, and the memory of a build there.
SELECT w.nodename || ':' || w.nodeport AS node, w.success, split_part(w.result, ' ', 1) AS pgvector,
       CASE WHEN w.success THEN split_part(w.result, ' ', 2)::bigint END AS memory
FROM run_command_on_workers($$
    SELECT coalesce((SELECT a.default_version FROM pg_available_extensions a WHERE a.name = 'vector'), 'none') || ' '
        || pg_size_bytes(current_setting('maintenance_work_mem'))
$$) w ORDER BY 1;

-- name: on_all_nodes
-- purpose: What each node answers to a command, or why it does not.
SELECT coalesce(d.nodename || ':' || d.nodeport, 'this node') AS node, n.success, n.result
FROM run_command_on_all_nodes(%(command)s) n LEFT JOIN pg_dist_node d USING (nodeid) ORDER BY 1;

-- name: node_sizes
-- purpose: Asked of a node: what it has of the table, and to spare; one JSON object.
SELECT json_build_object(
    'shards', count(*), 'heap_bytes', coalesce(sum(b.bytes), 0)::bigint,
    'memory_bytes', pg_size_bytes(current_setting('maintenance_work_mem')),
    'free_disk_bytes', (SELECT d.available_disk_size FROM citus_local_disk_space_stats() d),
    'max_wal_bytes', pg_size_bytes(current_setting('max_wal_size')))
FROM pg_dist_shard s JOIN pg_dist_placement p USING (shardid) JOIN pg_dist_local_group l USING (groupid)
CROSS JOIN LATERAL (SELECT pg_table_size(to_regclass(shard_name(s.logicalrelid, s.shardid))) AS bytes) b
WHERE s.logicalrelid = to_regclass({table_name});

-- name: builds_at_once
-- purpose: How many shards of a node Citus works on at once.
SELECT current_setting('citus.max_adaptive_executor_pool_size') AS builds;

-- name: shard_indexes
-- purpose: The index on each copy of each shard, by the catalogue of its node.
WITH placed AS (
    SELECT s.shardid, n.nodename, n.nodeport, n.groupid = 0 AS coordinator,
           x.schema || shard_name(s.logicalrelid, s.shardid) AS relation,
           x.schema || shard_name(to_regclass(%(index)s), s.shardid) AS name
    FROM pg_dist_shard s JOIN pg_dist_placement p USING (shardid) JOIN pg_class c ON c.oid = s.logicalrelid
    -- It leaves this one schema out.
    CROSS JOIN LATERAL (SELECT CASE WHEN c.relnamespace = to_regnamespace('public') THEN 'public.' ELSE '' END AS schema) x
    JOIN pg_dist_node n ON n.groupid = p.groupid AND n.noderole = 'primary'
    WHERE s.logicalrelid = to_regclass(%(table)s)
), asked AS (
    SELECT p.nodename, p.nodeport, format($$
        SELECT coalesce(json_object_agg(x.shard, json_build_object(
            'state', CASE WHEN i.indexrelid IS NULL THEN 'missing' WHEN i.indisvalid AND i.indisready THEN 'valid'
                          ELSE 'invalid' END,
            'bytes', coalesce(pg_relation_size(i.indexrelid), 0), 'heap', coalesce(pg_relation_size(to_regclass(x.relation)), 0),
            'done', (SELECT max(b.blocks_done) FROM pg_stat_progress_create_index b WHERE b.relid = to_regclass(x.relation))
        )), '{{}}') FROM unnest(%%L::bigint[], %%L::text[], %%L::text[]) AS x (shard, relation, name)
        LEFT JOIN pg_index i ON i.indexrelid = to_regclass(x.name) AND i.indrelid = to_regclass(x.relation)
    $$, array_agg(p.shardid), array_agg(p.relation), array_agg(p.name)) AS command
    FROM placed p GROUP BY p.nodename, p.nodeport
), answered AS (
    SELECT r.* FROM (SELECT array_agg(nodename) AS nodes, array_agg(nodeport) AS ports, array_agg(command) AS commands FROM asked) a,
         master_run_on_worker(a.nodes, a.ports, a.commands, true) r
)
SELECT p.shardid AS shard, p.nodename::text AS node, p.nodeport AS port, p.coordinator, p.relation,
       p.name, (parse_ident(p.name))[2] AS bare_name, coalesce(x.found ->> 'state', 'unknown') AS state,
       coalesce((x.found ->> 'bytes')::bigint, 0) AS bytes, coalesce((x.found ->> 'heap')::bigint, 0) AS heap_bytes,
       coalesce((x.found ->> 'done')::bigint, 0) AS blocks_done,
       CASE WHEN a.success THEN '' ELSE a.result END AS said
FROM placed p JOIN answered a ON (a.node_name, a.node_port) = (p.nodename, p.nodeport)
CROSS JOIN LATERAL (SELECT CASE WHEN a.success THEN a.result::json -> p.shardid::text END AS found) x
ORDER BY p.shardid, p.nodename, p.nodeport;

-- name: build_on_shard
-- purpose: Build the index of one shard, on the node of that shard alone; its other shards and theirs are not touched.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}, for the whole build; it waits for older transactions to end
-- undo: index.drop
DO $$
DECLARE
    answer record;
BEGIN
    FOR answer IN SELECT * FROM master_run_on_worker(ARRAY[{node}], ARRAY[{port}], ARRAY[{command}], false) LOOP
        IF NOT answer.success THEN
            RAISE EXCEPTION USING MESSAGE = answer.result;
        END IF;
    END LOOP;
END $$;

-- name: index_is_whole
-- purpose: Make the index of the distributed table valid, and known on every node, now that those of its shards are; it holds no row itself.
-- lock: SHARE on {table} as each node has it, which holds no row, for milliseconds
-- undo: index.drop
SET LOCAL citus.enable_ddl_propagation = off;
DO $$
DECLARE
    answer     record;
    definition text;
    path       text := current_setting('search_path');
    -- The workers do not know this session's.
    wait       text := 'SET lock_timeout TO ' || quote_literal(current_setting('lock_timeout')) || '; ';
BEGIN
    -- With every name qualified.
    PERFORM set_config('search_path', 'pg_catalog', true);
    definition := replace(pg_get_indexdef(to_regclass({index_name})), 'CREATE INDEX ', 'CREATE INDEX IF NOT EXISTS ');
    PERFORM set_config('search_path', path, true);
    FOR answer IN SELECT * FROM run_command_on_workers(
        wait || 'SET citus.enable_ddl_propagation TO off; ' || definition) LOOP
        IF NOT answer.success THEN
            -- By this code it is tried again.
            RAISE EXCEPTION USING MESSAGE = answer.result, ERRCODE =
                CASE WHEN position('lock timeout' IN answer.result) > 0 THEN 'lock_not_available' ELSE 'raise_exception' END;
        END IF;
    END LOOP;
END $$;
REINDEX INDEX {qualified_index};

-- name: health.autovacuum
-- purpose: Autovacuum at work on one of this node's shards of the table.
SELECT v.pid, v.phase, v.relid::regclass::text AS relation
FROM pg_stat_progress_vacuum v JOIN pg_stat_activity a USING (pid)
WHERE a.backend_type = 'autovacuum worker' AND v.relid IN (
    SELECT to_regclass(shard_name(s.logicalrelid, s.shardid)) FROM pg_dist_shard s
    WHERE s.logicalrelid = to_regclass(%(table)s)
)
LIMIT 1;

-- name: health.blocked
-- purpose: The session of this node that waits longest for one of the backfill's workers, or for what one of them does here.
WITH ours AS (
    SELECT coalesce(array_agg(o.pid), ARRAY[]::int[]) AS pids FROM pg_stat_activity o
    WHERE citus_pid_for_gpid(substring(o.application_name FROM '^citus_internal gpid=([0-9]+)$')::bigint) = ANY (%(pids)s)
       OR (o.pid = ANY (%(pids)s) AND (SELECT l.groupid FROM pg_dist_local_group l) = 0)
)
SELECT a.pid, a.usename::text AS role, a.application_name AS application,
       extract(epoch FROM clock_timestamp() - a.query_start)::float8 * 1000 AS ms
FROM pg_stat_activity a, ours
WHERE a.wait_event_type = 'Lock' AND a.pid <> ALL (ours.pids) AND pg_blocking_pids(a.pid) && ours.pids
ORDER BY a.query_start LIMIT 1;

-- name: health.snapshot
-- purpose: The oldest transaction of this database, on this node, that holds back vacuum; not of the backfill's.
WITH ours AS (
    SELECT coalesce(array_agg(o.pid), ARRAY[]::int[]) AS pids FROM pg_stat_activity o
    WHERE citus_pid_for_gpid(substring(o.application_name FROM '^citus_internal gpid=([0-9]+)$')::bigint) = ANY (%(pids)s)
       OR (o.pid = ANY (%(pids)s) AND (SELECT l.groupid FROM pg_dist_local_group l) = 0)
)
SELECT who, age_s FROM (
    SELECT format('pid %%s (%%s, %%s, %%s)', a.pid, a.usename, coalesce(nullif(a.application_name, ''), 'no name'),
                  a.state) AS who, extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS age_s
    FROM pg_stat_activity a, ours
    WHERE a.datname = current_database() AND a.pid <> ALL (ours.pids) AND a.pid <> pg_backend_pid()
      AND a.backend_xmin IS NOT NULL AND a.backend_type = 'client backend'
    UNION ALL
    SELECT format('prepared transaction %%s', p.gid), extract(epoch FROM clock_timestamp() - p.prepared)::float8
    FROM pg_prepared_xacts p WHERE p.database = current_database()
) old ORDER BY age_s DESC LIMIT 1;

-- name: preflight.table
-- purpose: Size, structure and write statistics of the table, added up over its shards.
SELECT coalesce(sum((s.x ->> 'rows')::float8), 0)::bigint AS estimated_rows,
    coalesce(max((s.x ->> 'rows')::float8), 0)::bigint AS largest_partition_rows,
    count(*) AS partitions,
    coalesce(sum((s.x ->> 'heap')::bigint), 0)::bigint AS heap_bytes,
    coalesce(sum((s.x ->> 'toast')::bigint), 0)::bigint AS toast_bytes,
    coalesce(sum((s.x ->> 'indexes')::bigint), 0)::bigint AS indexes_bytes,
    coalesce(max((s.x ->> 'fillfactor')::int), 100) AS fillfactor,
    coalesce(sum((s.x ->> 'updates')::bigint), 0)::bigint AS updates,
    coalesce(sum((s.x ->> 'hot')::bigint), 0)::bigint AS hot_updates,
    coalesce(sum((s.x ->> 'inserts')::bigint), 0)::bigint AS inserts,
    coalesce(sum((s.x ->> 'dead')::bigint), 0)::bigint AS dead_rows,
    min((s.x ->> 'since')::float8) AS counted_for_s
FROM (
    SELECT r.result::json AS x FROM run_command_on_shards(to_regclass(%(table)s), $$
        SELECT json_build_object('rows', greatest(c.reltuples, 0), 'heap', pg_relation_size(c.oid),
            'toast', pg_table_size(c.oid) - pg_relation_size(c.oid), 'indexes', pg_indexes_size(c.oid),
            'fillfactor', substring(array_to_string(c.reloptions, ',') FROM 'fillfactor=(\d+)')::int,
            'updates', s.n_tup_upd, 'hot', s.n_tup_hot_upd, 'inserts', s.n_tup_ins, 'dead', s.n_dead_tup,
            'since', (SELECT extract(epoch FROM now() - coalesce(d.stats_reset, pg_postmaster_start_time()))
                      FROM pg_stat_database d WHERE d.datname = current_database()))
        FROM pg_class c LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid WHERE c.oid = '%%s'::regclass
    $$) r WHERE r.success
) s;

-- name: watch.size
-- purpose: Rows alive and dead by the statistics, and how often they were vacuumed, added up over the shards.
SELECT coalesce(sum(split_part(r.result, ' ', 1)::bigint), 0)::bigint AS live,
       coalesce(sum(split_part(r.result, ' ', 2)::bigint), 0)::bigint AS dead,
       coalesce(sum(split_part(r.result, ' ', 3)::bigint), 0)::bigint AS vacuums
FROM run_command_on_shards(to_regclass(%(table)s), $$
    SELECT concat_ws(' ', pg_stat_get_live_tuples(o), pg_stat_get_dead_tuples(o),
                     pg_stat_get_vacuum_count(o) + pg_stat_get_autovacuum_count(o))
    FROM (SELECT '%%s'::regclass::oid) AS shard (o)
$$) r WHERE r.success;

-- name: row_counts.estimated
-- purpose: Rows of a relation by the planner's estimate, added up over its shards.
SELECT coalesce(sum(greatest(r.result::float8, 0)), 0)::bigint AS rows, true AS there,
       coalesce(bool_or(r.result::float8 > 0), false) AS analyzed, ARRAY[]::text[] AS not_estimated
FROM run_command_on_shards(to_regclass(%(relation)s), $$
    SELECT c.reltuples FROM pg_class c WHERE c.oid = '%%s'::regclass
$$) r WHERE r.success;

-- name: schema.create_staging
-- purpose: Create the staging table and distribute it as the table is, so that each vector lies next to its row; and make text and hash of a row by functions that Citus takes in an UPDATE, since concat_ws and convert_to are only STABLE.
-- lock: ACCESS SHARE on {table}
-- undo: schema.drop_staging
CREATE OR REPLACE FUNCTION {text_function}(VARIADIC parts text[]) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT pg_catalog.array_to_string(parts, E'\n'::pg_catalog.text) $$;
CREATE OR REPLACE FUNCTION {text_hash_function}(VARIADIC parts text[]) RETURNS bytea
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT substring(pg_catalog.sha256(pg_catalog.convert_to(
        pg_catalog.array_to_string(parts, E'\n'::pg_catalog.text), 'UTF8'::pg_catalog.name)) from 1 for {hash_bytes})
$$;
{make_key_part}{own};
SELECT create_distributed_table({staging_name}, {own_distribution_column}, colocate_with => {table_name});

-- name: schema.drop_staging
-- purpose: Remove the staging table, the table of rejected vectors, and the functions of text and hash.
-- lock: none on the target
-- undo: schema.create_staging, then load again
{own};
DROP FUNCTION IF EXISTS {text_function}(text[]);
DROP FUNCTION IF EXISTS {text_hash_function}(text[]){drop_key_part};

-- name: make_key_part
-- purpose: Part of schema.create_staging, for a key of several columns: one column of each key of a batch. IMMUTABLE, so that Citus knows the shard of a batch before it plans it.
CREATE OR REPLACE FUNCTION {key_part_function}(keys text[], place integer) RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT pg_catalog.array_agg(k::pg_catalog.jsonb OPERATOR(pg_catalog.->>) place) FROM pg_catalog.unnest(keys) AS k
$$;

-- name: drop_key_part
-- purpose: Part of schema.drop_staging, for a key of several columns.
; DROP FUNCTION IF EXISTS {key_part_function}(text[], integer);

-- name: of_one_shard
-- purpose: Part of a batch's statement, for a key of several columns: the values of its first column, by which the table is distributed.
{column} = ANY ({key_part_function}(%(keys)s::text[], 0)::{type}[]) AND 
-- name: schema.create_rejected
-- purpose: Create the table of rejected vectors, with a copy on every node, since a rejected row may have no key.
-- lock: ACCESS SHARE on {table}
-- undo: schema.drop_staging
{own};
SELECT create_reference_table({rejected_name});

-- name: schema.create_queue
-- purpose: Create the queue of changed rows and distribute it as the table is, so that the trigger writes on its own node.
-- lock: ACCESS SHARE on {table}
-- undo: schema.drop_queue
CREATE TABLE IF NOT EXISTS {queue} AS
    SELECT {t.key AS own_key}, now() AS queued_at FROM {table} t WITH NO DATA;
ALTER TABLE {queue}
    ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY,
    ADD COLUMN claimed_by bigint,
    ADD COLUMN claimed_at timestamptz,
    ADD COLUMN attempts integer NOT NULL DEFAULT 0,
    ADD COLUMN error text,
    {own_key NOT NULL},
    ALTER COLUMN queued_at SET DEFAULT clock_timestamp();
ALTER TABLE {queue} ADD PRIMARY KEY ({own_key}, id);
SELECT create_distributed_table({queue_name}, {own_distribution_column}, colocate_with => {table_name});

-- name: backfill.keys_between
-- purpose: The staged keys of a range, a list a shard: a batch of one shard is one task. In any order, so that workers are on different shards.
WITH k AS MATERIALIZED (SELECT {s.own_key} FROM {staging} s WHERE {after} AND {s.own_key <= %to_key})
SELECT array_agg({one k.own_key} ORDER BY {k.own_key}) AS keys FROM k
GROUP BY get_shard_id_for_distribution_column({table_name}, k.{own_distributed}) ORDER BY random();

-- name: backfill.update
-- purpose: Give each row of a batch its vector, if its text is still the text that was embedded. The keys are given for both tables: by those of either alone Citus asks every shard of the other.
-- lock: ROW EXCLUSIVE on {table}, on the rows of one batch, until its commit
-- undo: schema.drop_columns
UPDATE {part} t
SET {embedding} = s.embedding, {embedding_hash} = s.text_hash, {embedding_updated_at} = now()
FROM {staging} s
WHERE {staged_in_one_shard}{row_in_one_shard}{s.own_key IN %keys} AND {t.key IN %keys} AND {s.own_key = t.key}
  AND t.{embedding_hash} IS DISTINCT FROM s.text_hash
  AND s.text_hash = {text_hash};

-- name: backfill.hot
-- purpose: The workers count the updates of a distributed table, and nothing here does.
SELECT 0::bigint AS updates, 0::bigint AS hot;

-- name: backfill.server_counts
-- purpose: The positions of the WAL of all nodes added up, how large the table's shards are, and how many updates of them touched no index.
SELECT sum((n.result::json ->> 'wal')::bigint)::bigint AS wal, sum((n.result::json ->> 'hot')::bigint)::bigint AS hot,
       citus_table_size(to_regclass(%(table)s))::bigint AS bytes
FROM run_command_on_all_nodes(format($$
    SELECT json_build_object('wal', pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint, 'hot', (
        SELECT coalesce(sum(pg_stat_get_tuples_hot_updated(to_regclass(shard_name(s.logicalrelid, s.shardid)))), 0)
        FROM pg_dist_shard s JOIN pg_dist_placement p USING (shardid) JOIN pg_dist_local_group l USING (groupid)
        WHERE s.logicalrelid = to_regclass(%%L)))
$$, %(table)s::text)) n WHERE n.success;

-- name: refresh.claim
-- purpose: Claim the oldest changes of those that were there when the drain began. Citus knows no SKIP LOCKED across shards: what another session claims meanwhile is asked for once more as the row is written, and a claim ends with its lease alone.
-- lock: ROW EXCLUSIVE on the queue, for milliseconds
-- undo: refresh.release
UPDATE {queue} SET claimed_by = %(worker)s, claimed_at = now() WHERE id IN (
    SELECT q.id FROM {queue} q
    WHERE (q.queued_at <= %(until)s OR q.queued_at > clock_timestamp()) AND q.attempts < %(tries)s AND q.id <> ALL (%(put_off)s)
      AND (q.claimed_by IS NULL OR q.claimed_at < now() - make_interval(secs => %(lease_s)s))
    ORDER BY q.queued_at, q.id LIMIT %(batch_rows)s
) AND (claimed_by IS NULL OR claimed_at < now() - make_interval(secs => %(lease_s)s)) RETURNING id, {own_key};

-- name: refresh.lock_rows
-- purpose: Which of these rows exist; Citus does not lock rows across shards, and the update compares the text's hash.
SELECT {one t.key AS key} FROM {table} t WHERE {row_in_one_shard}{t.key IN %keys};

-- name: search.create_route
-- purpose: Create the table that says where reads go, with a copy on every node, so that the function answers on each; one row moves them.
-- lock: none on the target
-- undo: search.drop_function
{own};
SELECT create_reference_table({route_name})
WHERE NOT EXISTS (SELECT 1 FROM pg_dist_partition WHERE logicalrelid = to_regclass({route_name}));

-- name: search.create_strategy
-- purpose: Create the table that says how to search by each filter, with a copy on every node; 70_tune fills it.
-- lock: none on the target
-- undo: search.drop_function
{own};
SELECT create_reference_table({strategy_name})
WHERE NOT EXISTS (SELECT 1 FROM pg_dist_partition WHERE logicalrelid = to_regclass({strategy_name}));

-- name: live.create_log
-- purpose: Create the log of sampled calls, with a copy on every node, so that calls on each are logged.
-- lock: none on the target
-- undo: live.drop_log
{own};
SELECT create_reference_table({log_name})
WHERE NOT EXISTS (SELECT 1 FROM pg_dist_partition WHERE logicalrelid = to_regclass({log_name}));

-- name: settings_of_role
-- purpose: pgvector's settings that a role's sessions begin with in this database; no row where it has none of its own.
SELECT s.setconfig AS settings FROM pg_db_role_setting s
WHERE s.setrole = (SELECT r.oid FROM pg_roles r WHERE r.rolname = coalesce(%(role)s, current_user))
  AND s.setdatabase = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());

-- name: may_alter
-- purpose: Of these roles, and this one, those whose settings this session may change.
SELECT r.rolname::text AS role FROM pg_roles r
WHERE r.rolname = current_user OR (r.rolname = ANY (%(roles)s) AND (
    (SELECT o.rolsuper FROM pg_roles o WHERE o.rolname = current_user)
    OR ((SELECT o.rolcreaterole FROM pg_roles o WHERE o.rolname = current_user) AND NOT r.rolsuper
        AND pg_has_role(current_user, r.oid, 'MEMBER WITH ADMIN OPTION'))))
ORDER BY r.rolname = current_user DESC, r.rolname;

-- name: set_search_settings
-- purpose: Give a role's new sessions a measured index setting, on every node; a query first loads pgvector there, without which a worker refuses its settings.
-- lock: none on the target
-- undo: citus.reset_search_settings
SELECT '[1]'::{pgvectors_type} FROM {table} t LIMIT 1;
ALTER ROLE {role} IN DATABASE {database} SET {setting} = {value};

-- name: reset_search_settings
-- purpose: Take an index setting from a role's new sessions, on every node; a query first loads pgvector there.
-- lock: none on the target
-- undo: citus.set_search_settings
SELECT '[1]'::{pgvectors_type} FROM {table} t LIMIT 1;
ALTER ROLE {role} IN DATABASE {database} RESET {setting};
