-- An ordinary table becomes a partitioned one while it is in use. {table} is the table that serves; {beside} is the
-- other one: the partitioned table before the swap, the ordinary one after it.

-- name: standing
-- purpose: The state of the move: which table serves, which other one exists, and how far the copy is.
SELECT (SELECT relkind::text FROM pg_class WHERE oid = to_regclass(%(table)s)) AS serves,
       to_regclass(%(parts)s) IS NOT NULL AS parts, to_regclass(%(whole)s) IS NOT NULL AS whole,
       to_regclass(%(move)s) IS NOT NULL AS begun;

-- name: session
-- purpose: Raise an error if a row security policy would hide rows from this session.
SELECT set_config('row_security', 'off', false);

-- name: key
-- purpose: The primary key, and whether the partition column may be NULL.
SELECT (SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_constraint c
        JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey)
        WHERE c.conrelid = to_regclass(%(table)s) AND c.contype = 'p') AS primary_key,
       (SELECT c.conname::text FROM pg_constraint c
        WHERE c.conrelid = to_regclass(%(table)s) AND c.contype = 'p') AS key_name,
       (SELECT a.attnotnull FROM pg_attribute a
        WHERE a.attrelid = to_regclass(%(table)s) AND a.attname = %(column)s) AS not_null,
       (SELECT pg_get_userbyid(relowner)::text FROM pg_class WHERE oid = to_regclass(%(table)s)) AS owner,
       current_user::text AS role;

-- name: in_the_way
-- purpose: What cannot be carried over to a partitioned table of the same name, by name.
WITH t AS (SELECT * FROM pg_class WHERE oid = to_regclass(%(table)s))
SELECT 'foreign key' AS what, format('%%s on %%s', c.conname, c.conrelid::regclass) AS name
FROM pg_constraint c, t WHERE c.contype = 'f' AND t.oid IN (c.conrelid, c.confrelid)
UNION ALL
SELECT 'view or rule', format('%%s of %%s', r.rulename, r.ev_class::regclass)
FROM pg_rewrite r, t WHERE r.ev_class = t.oid OR EXISTS (
    SELECT FROM pg_depend d WHERE d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
      AND d.refclassid = 'pg_class'::regclass AND d.refobjid = t.oid)
UNION ALL
SELECT DISTINCT 'function bound to the table', pg_describe_object(d.classid, d.objid, 0)
FROM pg_depend d, t WHERE d.classid = 'pg_proc'::regclass
  AND (d.refclassid, d.refobjid) IN (('pg_class'::regclass, t.oid), ('pg_type'::regclass, t.reltype))
UNION ALL
SELECT 'column of its row type', pg_describe_object(d.classid, d.objid, d.objsubid)
FROM pg_depend d, t WHERE d.classid = 'pg_class'::regclass AND d.objid <> t.oid
  AND d.refclassid = 'pg_type'::regclass AND d.refobjid = t.reltype
UNION ALL
SELECT 'policy of another table', pg_describe_object(d.classid, d.objid, 0)
FROM pg_depend d JOIN pg_policy p ON p.oid = d.objid, t
WHERE d.classid = 'pg_policy'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = t.oid
  AND p.polrelid <> t.oid
UNION ALL
SELECT 'publication', p.pubname::text FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid, t
WHERE r.prrelid = t.oid
UNION ALL
SELECT 'inheritance', i.inhrelid::regclass::text FROM pg_inherits i, t WHERE t.oid IN (i.inhrelid, i.inhparent)
UNION ALL
SELECT CASE WHEN NOT i.indisvalid THEN 'invalid index' WHEN i.indisexclusion THEN 'exclusion constraint'
       ELSE 'unique index' END, i.indexrelid::regclass::text
FROM pg_index i, t WHERE i.indrelid = t.oid AND NOT i.indisprimary
  AND (i.indisunique OR i.indisexclusion OR NOT i.indisvalid)
UNION ALL
SELECT 'partial vector index (undo operate/serve_filters)', i.indexrelid::regclass::text
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am am ON am.oid = c.relam, t
WHERE i.indrelid = t.oid AND i.indpred IS NOT NULL AND am.amname IN ('hnsw', 'ivfflat')
UNION ALL
SELECT CASE WHEN g.tgenabled NOT IN ('O', 'A') THEN 'trigger that is not enabled in the usual way'
       ELSE 'row trigger with transition tables' END, g.tgname::text
FROM pg_trigger g, t WHERE g.tgrelid = t.oid AND NOT g.tgisinternal
  AND (g.tgenabled NOT IN ('O', 'A') OR (g.tgtype & 1 = 1 AND (g.tgoldtable IS NOT NULL OR g.tgnewtable IS NOT NULL)))
UNION ALL
SELECT 'security label', l.provider FROM pg_seclabel l, t WHERE l.classoid = 'pg_class'::regclass AND l.objoid = t.oid
UNION ALL
SELECT what, t.relname::text FROM t, LATERAL (VALUES
    ('replica identity other than the default', t.relreplident <> 'd'),
    ('tablespace other than the default', t.reltablespace <> 0),
    ('typed table', t.reloftype <> 0),
    ('table that is not logged', t.relpersistence <> 'p')) AS v (what, holds) WHERE v.holds
ORDER BY 1, 2;

-- name: columns
-- purpose: The columns to write, in order, without generated ones.
SELECT a.attname::text AS name FROM pg_attribute a
WHERE a.attrelid = to_regclass(%(table)s) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
ORDER BY a.attnum;

-- name: options
-- purpose: Storage options of the table, which each partition is given.
SELECT o AS option FROM pg_class c, unnest(c.reloptions) AS o WHERE c.oid = to_regclass(%(table)s)
UNION ALL
SELECT 'toast.' || o FROM pg_class c JOIN pg_class s ON s.oid = c.reltoastrelid, unnest(s.reloptions) AS o
WHERE c.oid = to_regclass(%(table)s);

-- name: indexes
-- purpose: The table's indexes, each with the part of CREATE INDEX after its name and table.
SELECT c.relname::text AS name, i.indisprimary AS is_key, am.amname::text AS method,
       substr(pg_get_indexdef(c.oid), length(format('CREATE INDEX %%I ON %%s%%I.%%I', c.relname,
           CASE WHEN t.relkind = 'p' THEN 'ONLY ' ELSE '' END, n.nspname, t.relname)) + 1) AS tail
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid
JOIN pg_namespace n ON n.oid = t.relnamespace JOIN pg_am am ON am.oid = c.relam
WHERE i.indrelid = to_regclass(%(relation)s) ORDER BY am.amname IN ('hnsw', 'ivfflat'), c.relname;

-- name: definitions
-- purpose: Objects that refer to the table by name, as statements: run after the swap, they mean the table that then serves.
WITH t AS (SELECT c.*, format('%%I.%%I', n.nspname, c.relname) AS full_name FROM pg_class c
           JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%(table)s))
SELECT 1 AS place, pg_get_triggerdef(g.oid) AS statement FROM pg_trigger g, t
WHERE g.tgrelid = t.oid AND NOT g.tgisinternal AND g.tgname <> ALL (%(own_triggers)s)
UNION ALL
SELECT 2, format('ALTER TABLE %%s ENABLE ALWAYS TRIGGER %%I', t.full_name, g.tgname) FROM pg_trigger g, t
WHERE g.tgrelid = t.oid AND NOT g.tgisinternal AND g.tgenabled = 'A' AND g.tgname <> ALL (%(own_triggers)s)
UNION ALL
SELECT 2, format('GRANT %%s ON %%s TO %%s%%s', a.privilege_type, t.full_name,
       CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END,
       CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
FROM t, aclexplode(t.relacl) AS a WHERE a.grantee <> t.relowner
UNION ALL
SELECT 3, format('GRANT %%s (%%I) ON %%s TO %%s%%s', a.privilege_type, c.attname, t.full_name,
       CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END,
       CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
FROM t JOIN pg_attribute c ON c.attrelid = t.oid, aclexplode(c.attacl) AS a
UNION ALL
SELECT 4, format('CREATE POLICY %%I ON %%s AS %%s FOR %%s TO %%s%%s%%s', p.polname, t.full_name,
       CASE WHEN p.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
       CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE'
       ELSE 'ALL' END,
       (SELECT string_agg(CASE WHEN r = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(r)) END, ', ')
        FROM unnest(p.polroles) AS r),
       ' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')',
       ' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')')
FROM pg_policy p, t WHERE p.polrelid = t.oid
UNION ALL
SELECT 5, format('ALTER TABLE %%s %%s ROW LEVEL SECURITY', t.full_name, v.what)
FROM t, LATERAL (VALUES ('ENABLE', t.relrowsecurity), ('FORCE', t.relforcerowsecurity)) AS v (what, holds) WHERE v.holds
UNION ALL
SELECT 6, format('COMMENT ON TABLE %%s IS %%L', t.full_name, obj_description(t.oid, 'pg_class'))
FROM t WHERE obj_description(t.oid, 'pg_class') IS NOT NULL
UNION ALL
SELECT 7, format('ALTER TABLE %%s ALTER COLUMN %%I SET STATISTICS %%s', t.full_name, a.attname, a.attstattarget)
FROM t JOIN pg_attribute a ON a.attrelid = t.oid WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attstattarget >= 0
ORDER BY 1, 2;

-- name: fire_always
-- purpose: Triggers that also fire for replicated rows, which ENABLE TRIGGER USER does not restore.
SELECT format('ALTER TABLE %%s ENABLE ALWAYS TRIGGER %%I', %(table)s::text, g.tgname) AS statement
FROM pg_trigger g JOIN pg_trigger kept ON kept.tgname = g.tgname AND kept.tgrelid = to_regclass(%(beside)s)
WHERE g.tgrelid = to_regclass(%(table)s) AND NOT g.tgisinternal AND g.tgenabled = 'A'
  AND g.tgname <> ALL (%(own_triggers)s) ORDER BY 1;

-- name: owned_sequences
-- purpose: Sequences owned by a column, which are moved with the name, so that dropping a table keeps them.
SELECT format('ALTER SEQUENCE %%s OWNED BY %%I.%%I.%%I', s.oid::regclass, n.nspname, c.relname, a.attname) AS statement
FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_class c ON c.oid = d.refobjid
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid
WHERE d.refobjid = to_regclass(%(table)s) AND d.deptype = 'a' AND d.classid = 'pg_class'::regclass
  AND d.refclassid = 'pg_class'::regclass;

-- name: identities
-- purpose: Identity columns: their sequences continue from those of the other table.
SELECT format('SELECT setval(%%L, s.last_value, s.is_called) FROM %%s s', pg_get_serial_sequence(%(beside)s, a.attname),
              pg_get_serial_sequence(%(table)s, a.attname)) AS statement
FROM pg_attribute a WHERE a.attrelid = to_regclass(%(table)s) AND a.attidentity <> '' AND NOT a.attisdropped;

-- name: create_queue
-- purpose: Create the queue of changed keys, and the row that records how far the copy is.
-- lock: none on the target
-- undo: partitioning.drop_queue
CREATE TABLE {move_queue} (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key {key_type});
COMMENT ON TABLE {move_queue} IS 'Keys changed since they were copied; NULL stands for TRUNCATE.';
CREATE TABLE {move} (last_key {key_type}, rows bigint NOT NULL DEFAULT 0, copied boolean NOT NULL DEFAULT false);
ALTER TABLE {move} REPLICA IDENTITY FULL;
INSERT INTO {move} DEFAULT VALUES;

-- name: create_capture
-- purpose: Create the function that queues changed keys. It runs as its owner, so writers need no privileges on the ledger.
-- lock: none on the target
-- undo: partitioning.drop_queue
CREATE OR REPLACE FUNCTION {move_capture}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        INSERT INTO {move_queue} (key) VALUES (NULL);
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO {move_queue} (key) VALUES (OLD.{key});
    END IF;
    IF TG_OP = 'INSERT' OR (TG_OP = 'UPDATE' AND OLD.{key} IS DISTINCT FROM NEW.{key}) THEN
        INSERT INTO {move_queue} (key) VALUES (NEW.{key});
    END IF;
    RETURN NULL;
END
$$;

-- name: create_table
-- purpose: Create the empty partitioned table: columns, defaults, checks, statistics, partitions, key.
-- lock: none that others wait for; ACCESS SHARE on {table}, for milliseconds
-- undo: partitioning.drop_table
CREATE TABLE {parts} (LIKE {table} INCLUDING ALL EXCLUDING INDEXES) PARTITION BY {method} ({column});
{partitions};
ALTER TABLE {parts} ADD CONSTRAINT {parts_key} PRIMARY KEY ({key}, {column});

-- name: partition_of_value
-- purpose: Part of create_table: the partition of one value.
CREATE TABLE {leaf} PARTITION OF {parts} FOR VALUES IN ({value}) {options};

-- name: partition_of_rest
-- purpose: Part of create_table: the default partition.
CREATE TABLE {leaf} PARTITION OF {parts} DEFAULT {options};

-- name: partition_by_hash
-- purpose: Part of create_table: one hash partition.
CREATE TABLE {leaf} PARTITION OF {parts} FOR VALUES WITH (MODULUS {modulus}, REMAINDER {remainder}) {options};

-- name: set_owner
-- purpose: Part of create_table: give the partitioned table or a partition the owner of the table.
ALTER TABLE {relation} OWNER TO {owner};

-- name: create_triggers
-- purpose: Queue the key of every row that is inserted, updated or deleted from now on.
-- lock: SHARE ROW EXCLUSIVE on {table}, for milliseconds; it waits for open writers
-- undo: partitioning.drop_triggers
CREATE TRIGGER {move_trigger} AFTER INSERT OR UPDATE OR DELETE ON {table}
    FOR EACH ROW EXECUTE FUNCTION {move_capture}();
CREATE TRIGGER {move_truncate_trigger} AFTER TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION {move_capture}();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {move_trigger}, ENABLE ALWAYS TRIGGER {move_truncate_trigger};

-- name: drop_triggers
-- purpose: Stop queueing changed keys.
-- lock: ACCESS EXCLUSIVE on {table}, for milliseconds
-- undo: partitioning.create_triggers
DROP TRIGGER IF EXISTS {move_trigger} ON {table};
DROP TRIGGER IF EXISTS {move_truncate_trigger} ON {table};

-- name: copying
-- purpose: How far the copy is.
SELECT last_key, rows, copied FROM {move};

-- name: copy_batch
-- purpose: Copy the next rows by key, and record the progress, in one transaction.
-- lock: none that others wait for
-- undo: partitioning.drop_table
WITH batch AS (
    SELECT {columns} FROM {table} t, {move} m WHERE m.last_key IS NULL OR t.{key} > m.last_key
    ORDER BY t.{key} LIMIT %(rows)s
), copied AS (
    INSERT INTO {beside} ({written}) OVERRIDING SYSTEM VALUE SELECT {written} FROM batch RETURNING {key}
)
UPDATE {move} m SET rows = m.rows + (SELECT count(*) FROM copied), copied = (SELECT count(*) FROM copied) < %(rows)s,
       last_key = coalesce((SELECT {key} FROM copied ORDER BY {key} DESC LIMIT 1), m.last_key)
RETURNING m.rows, m.copied;

-- name: queued
-- purpose: Changes that wait, counted up to a bound.
SELECT count(*) AS rows FROM (SELECT FROM {move_queue} LIMIT %(most)s) AS q;

-- name: take
-- purpose: Take the oldest changes from the queue.
WITH taken AS (
    DELETE FROM {move_queue} WHERE seq IN (SELECT seq FROM {move_queue} ORDER BY seq LIMIT %(rows)s) RETURNING key
)
SELECT count(*) AS rows, coalesce(bool_or(key IS NULL), false) AS truncated,
       array_agg(DISTINCT key) FILTER (WHERE key IS NOT NULL) AS keys FROM taken;

-- name: empty_beside
-- purpose: Follow a TRUNCATE.
TRUNCATE {beside};

-- name: take_away
-- purpose: Delete the old rows of changed keys.
DELETE FROM {beside} t WHERE t.{key} = ANY (%(keys)s::{key_type}[]);

-- name: put_back
-- purpose: Insert the rows of changed keys as they are now.
INSERT INTO {beside} ({written}) OVERRIDING SYSTEM VALUE
SELECT {columns} FROM {table} t WHERE t.{key} = ANY (%(keys)s::{key_type}[]);

-- name: create_index
-- purpose: Build an index of the table on every partition, before they are in use.
-- lock: none that others wait for
-- undo: partitioning.drop_table
CREATE INDEX {beside_index} ON {parts}{tail};

-- name: analyze
-- purpose: Collect statistics of the partitions.
-- lock: none that others wait for
-- undo: none needed
ANALYZE {parts};

-- name: lock
-- purpose: Lock the table for the last changes and the swap.
-- lock: ACCESS EXCLUSIVE on {table}, until the end of the transaction
LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;

-- name: swap
-- purpose: Swap the partitioned table in for the ordinary one: names, indexes, sequences, triggers, grants.
-- lock: ACCESS EXCLUSIVE on {table}, for the last changes and the swap
-- undo: partitioning.swap_back
DROP TRIGGER {move_trigger} ON {table};
DROP TRIGGER {move_truncate_trigger} ON {table};
{identities};
ALTER TABLE {table} DISABLE TRIGGER USER;
ALTER TABLE {table} RENAME TO {whole_name};
{indexes_away};
ALTER TABLE {parts} RENAME TO {table_name};
{indexes_here};
{definitions};
CREATE TRIGGER {move_trigger} AFTER INSERT OR UPDATE OR DELETE ON {table}
    FOR EACH ROW EXECUTE FUNCTION {move_capture}();
CREATE TRIGGER {move_truncate_trigger} AFTER TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION {move_capture}();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {move_trigger}, ENABLE ALWAYS TRIGGER {move_truncate_trigger};

-- name: swap_back
-- purpose: Swap the ordinary table back, with its triggers and every change since.
-- lock: ACCESS EXCLUSIVE on {table}, for the last changes and the swap
-- undo: partitioning.swap
DROP TRIGGER {move_trigger} ON {table};
DROP TRIGGER {move_truncate_trigger} ON {table};
{identities};
ALTER TABLE {table} RENAME TO {parts_name};
{indexes_away};
ALTER TABLE {whole} RENAME TO {table_name};
{indexes_here};
ALTER TABLE {table} ENABLE TRIGGER USER;
{definitions};
CREATE TRIGGER {move_trigger} AFTER INSERT OR UPDATE OR DELETE ON {table}
    FOR EACH ROW EXECUTE FUNCTION {move_capture}();
CREATE TRIGGER {move_truncate_trigger} AFTER TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION {move_capture}();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {move_trigger}, ENABLE ALWAYS TRIGGER {move_truncate_trigger};

-- name: rename_index
-- purpose: Part of swap: rename an index to its final name.
ALTER INDEX {index_was} RENAME TO {index_becomes};

-- name: drop_table
-- purpose: Drop the partitioned table, which is not in use.
-- lock: none on {table}
-- undo: partitioning.create_table
DROP TABLE IF EXISTS {parts};

-- name: drop_whole
-- purpose: Drop the ordinary table that served before; after that there is no rollback.
-- lock: none on {table}
-- undo: none
DROP TABLE IF EXISTS {whole};

-- name: drop_queue
-- purpose: Drop the queue of changed keys and the function that fills it.
-- lock: none on {table}
-- undo: partitioning.create_queue
DROP FUNCTION IF EXISTS {move_capture}();
DROP TABLE IF EXISTS {move_queue}, {move};

-- name: differences
-- purpose: Every row of both tables compared, byte by byte, in one snapshot; keys that wait in the queue are left out.
SELECT count(*) AS rows, count(*) FILTER (WHERE b.{key} IS NULL) AS lacking,
       count(*) FILTER (WHERE t.{key} IS NULL) AS extra,
       count(*) FILTER (WHERE t.{key} = b.{key} AND ROW({columns})::record *<> ROW({columns_beside})::record) AS different
FROM {table} t FULL JOIN {beside} b ON b.{key} = t.{key}
WHERE NOT EXISTS (SELECT FROM {move_queue} q WHERE q.key = coalesce(t.{key}, b.{key}));

-- name: partitioned_by
-- purpose: How the table is partitioned, and its partitions.
SELECT pg_get_partkeydef(c.oid) AS how,
       (SELECT count(*) FROM pg_partition_tree(c.oid) WHERE isleaf)::int AS partitions,
       (SELECT count(*) FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid)::int AS indexes
FROM pg_class c WHERE c.oid = to_regclass(%(relation)s);

-- name: capturing
-- purpose: Is the trigger that queues changed keys on the table?
SELECT tgname::text AS name FROM pg_trigger WHERE tgrelid = to_regclass(%(table)s) AND tgname = %(name)s;
