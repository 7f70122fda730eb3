-- What later phases will run, tried in transactions that are rolled back.

-- name: settings
-- purpose: Limit the waits of a trial, for this transaction only.
SELECT set_config('lock_timeout', %(lock_ms)s, true), set_config('statement_timeout', %(statement_ms)s, true);

-- name: create_probe
-- purpose: Create an empty table with the vector column, to try the index on; rolled back.
-- lock: none on the target
-- undo: its own rollback
CREATE TABLE {probe} ({embedding} {vector_type});

-- name: create_hnsw
-- purpose: Create the index of the parameters on that empty table; CONCURRENTLY cannot be tried in a transaction.
-- lock: none on the target
-- undo: its own rollback
CREATE INDEX ON {probe} USING hnsw ({indexed} {operator_class}) WITH (m = {m}, ef_construction = {ef_construction});

-- name: create_ivfflat
-- purpose: Create the index of the parameters on that empty table; CONCURRENTLY cannot be tried in a transaction.
-- lock: none on the target
-- undo: its own rollback
CREATE INDEX ON {probe} USING ivfflat ({indexed} {operator_class}) WITH (lists = 1);

-- name: columns
-- purpose: The columns of the table.
SELECT a.attname::text AS name FROM pg_attribute a
WHERE a.attrelid = to_regclass(%(table)s) AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum;

-- name: hooks
-- purpose: The triggers and rules of the table that an UPDATE of the new columns may set off, with their functions.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
), hook AS (
    SELECT 'trigger' AS kind, g.tgname::text AS name, g.tgrelid AS relation, p.oid AS function,
           pg_get_triggerdef(g.oid) AS definition, g.tgenabled AS enabled
    FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
    WHERE g.tgrelid IN (SELECT oid FROM part) AND NOT g.tgisinternal AND g.tgparentid = 0 AND (g.tgtype & 16) <> 0
      AND p.pronamespace IS DISTINCT FROM to_regnamespace(%(ledger)s)
    UNION ALL
    SELECT 'rule', r.rulename::text, r.ev_class, NULL, pg_get_ruledef(r.oid), r.ev_enabled
    FROM pg_rewrite r WHERE r.ev_class IN (SELECT oid FROM part) AND r.ev_type = '2'
)
SELECT h.kind, h.name, format('%%I.%%I', n.nspname, c.relname) AS relation, c.relname::text AS table_name,
       h.function::bigint AS function, h.definition
FROM hook h JOIN pg_class c ON c.oid = h.relation JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE h.enabled = 'A' OR h.enabled = CASE current_setting('session_replication_role') WHEN 'replica' THEN 'R' ELSE 'O' END::"char"
ORDER BY h.kind DESC, h.name, 3;

-- name: sources
-- purpose: The source of these functions and of every function that they may call.
WITH RECURSIVE called AS (
    SELECT p.oid AS root, p.oid, p.prosrc, p.prolang FROM pg_proc p WHERE p.oid = ANY (%(functions)s::bigint[]::oid[])
    UNION
    SELECT c.root, p.oid, p.prosrc, p.prolang
    FROM called c JOIN pg_proc p ON p.proname = ANY (regexp_split_to_array(c.prosrc, '\W+')::name[])
    JOIN pg_namespace n ON n.oid = p.pronamespace AND n.nspname NOT IN ('pg_catalog', 'information_schema')
)
SELECT c.root::bigint AS root, l.lanname::text AS language, l.lanpltrusted AS trusted, c.prosrc AS source
FROM called c JOIN pg_language l ON l.oid = c.prolang;

-- name: tells_on_its_own
-- purpose: Can an UPDATE change more than asked, or be refused, without any trigger or rule?
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid IN (SELECT oid FROM part) AND k.contype IN ('c', 'x'))
    OR EXISTS (SELECT FROM pg_index i WHERE i.indrelid IN (SELECT oid FROM part)
               AND (i.indexprs IS NOT NULL OR i.indpred IS NOT NULL))
    OR EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid IN (SELECT oid FROM part) AND a.attgenerated <> ''
               AND NOT a.attisdropped) AS it_may;

-- name: sample
-- purpose: Keys of rows from all over the table, the oldest and the newest among them.
SELECT {one own_key AS key} FROM (
    SELECT {own_key}, min(place) AS place FROM (
        (SELECT {t.key AS own_key}, 0 AS place FROM {table} t WHERE {wanting} ORDER BY {t.key} LIMIT %(ends)s)
        UNION ALL
        (SELECT {t.key}, 0 FROM {table} t WHERE {wanting} ORDER BY {t.key DESC} LIMIT %(ends)s)
        UNION ALL
        (SELECT {s.own_key}, 1 FROM (SELECT {t.key AS own_key} FROM {table} t {tablesample} WHERE {wanting} LIMIT %(many)s) s
         ORDER BY random() LIMIT %(rows)s)
    ) found GROUP BY {own_key}
) k ORDER BY place, random();

-- name: lock_rows
-- purpose: Lock these rows, except those that are already locked, so that no writer changes one between two reads.
-- lock: ROW SHARE on {table}, on these rows, rolled back at once
-- undo: its own rollback
SELECT {one t.key AS key} FROM {table} t WHERE {t.key IN %keys} FOR NO KEY UPDATE SKIP LOCKED;

-- name: look
-- purpose: A hash of each of the other columns of these rows, and whether the row has taken the vector.
SELECT {one t.key AS key}, {hashes} AS hashes, t.{embedding_hash} IS NOT NULL AND t.{embedding} IS NOT NULL AS taken
FROM {table} t WHERE {t.key IN %keys};

-- name: column_hash
-- purpose: The hash of one column; compared byte by byte, whatever its collation.
pg_catalog.hashtextextended(t.{column}::text COLLATE "C", 0::bigint);

-- name: staged
-- purpose: A stand-in for the staging table in the trial: vectors of these rows' current texts.
(SELECT {t.key AS own_key}, {text_hash} AS text_hash,
        pg_catalog.array_fill(0.5::real, ARRAY[{dimension}])::{vector_type} AS embedding
 FROM {table} t WHERE {t.key IN %keys});

-- name: written
-- purpose: Rows that this session has written, in the table and in whatever this transaction has opened for writing.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT c.oid::bigint AS oid, format('%%I.%%I', n.nspname, c.relname) AS relation,
       pg_stat_get_xact_tuples_inserted(c.oid) AS inserted, pg_stat_get_xact_tuples_updated(c.oid) AS updated,
       pg_stat_get_xact_tuples_deleted(c.oid) AS deleted, pg_stat_get_xact_tuples_hot_updated(c.oid) AS hot,
       c.oid IN (SELECT oid FROM part) AS own
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm') AND n.oid IS DISTINCT FROM to_regnamespace(%(ledger)s)
  AND (n.nspname <> 'pg_catalog' OR c.relname LIKE 'pg_largeobject%%')
  AND (c.oid IN (SELECT oid FROM part) OR c.oid IN (
      SELECT l.relation FROM pg_locks l WHERE l.pid = pg_backend_pid() AND l.mode = 'RowExclusiveLock'));

-- name: opened
-- purpose: Sequences that this transaction has advanced and foreign tables that it has written to, which are not counted.
SELECT DISTINCT c.relkind::text AS kind, format('%%I.%%I', n.nspname, c.relname) AS relation
FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE l.pid = pg_backend_pid() AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.mode = 'RowExclusiveLock' AND c.relkind IN ('S', 'f') AND n.oid IS DISTINCT FROM to_regnamespace(%(ledger)s)
ORDER BY 2;

-- name: disable_trigger
-- purpose: Disable one trigger during a trial.
-- lock: SHARE ROW EXCLUSIVE on {table}, for milliseconds, rolled back at once
-- undo: its own rollback
ALTER TABLE {relation} DISABLE TRIGGER {hook};

-- name: disable_rule
-- purpose: Disable one rule during a trial.
-- lock: ACCESS EXCLUSIVE on {table}, for milliseconds, rolled back at once
-- undo: its own rollback
ALTER TABLE {relation} DISABLE RULE {hook};

-- name: create_harmless_function
-- purpose: Create the function that replaces one that would act outside the database, during a trial.
-- lock: none on the target
-- undo: its own rollback
CREATE FUNCTION pg_temp.runbook_trial() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';

-- name: drop_trigger
-- purpose: Drop a trigger during a trial, to replace it by one that does nothing.
-- lock: ACCESS EXCLUSIVE on {table}, for milliseconds, rolled back at once
-- undo: its own rollback
DROP TRIGGER {hook} ON {relation};

-- name: unchecked
-- purpose: NOT VALID constraints: CHECK and NOT NULL that were never checked on older rows.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT k.conname::text AS name, format('%%I.%%I', n.nspname, c.relname) AS relation,
       coalesce(pg_get_expr(k.conbin, k.conrelid), format('%%I IS NOT NULL', a.attname)) AS condition
FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = k.conkey[1]
WHERE k.conrelid IN (SELECT oid FROM part) AND k.contype IN ('c', 'n') AND NOT k.convalidated
  AND coalesce(to_jsonb(k)->>'conenforced', 'true') = 'true'
ORDER BY 2, 1;

-- name: violated
-- purpose: Rows that violate such a constraint.
SELECT count(*) AS rows FROM ONLY {relation} WHERE NOT ({condition});
