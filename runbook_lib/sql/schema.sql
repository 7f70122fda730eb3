-- Phase 30: what is added to the application's own columns, and how it is removed.

-- name: add_columns
-- purpose: Add three empty columns: the vector, when it was set, and the hash of the text it was made from. A session's prepared SELECT * fails once ("cached plan must not change result type"): let the pool reconnect.
-- lock: ACCESS EXCLUSIVE on {table}, for milliseconds; nothing is rewritten
-- undo: schema.drop_columns
ALTER TABLE {table}
    ADD COLUMN IF NOT EXISTS {embedding} {vector_type},
    ADD COLUMN IF NOT EXISTS {embedding_updated_at} timestamptz,
    ADD COLUMN IF NOT EXISTS {embedding_hash} bytea;

-- name: create_staging
-- purpose: Create the staging table: one row per key, with the vector and the hash of the text it was made from.
-- lock: ACCESS SHARE on {table}
-- undo: schema.drop_staging
CREATE TABLE IF NOT EXISTS {staging} AS
    SELECT {t.key AS own_key}, NULL::bytea AS text_hash, NULL::{vector_type} AS embedding, now() AS staged_at
    FROM {table} t WITH NO DATA;
ALTER TABLE {staging}
    ADD PRIMARY KEY ({own_key}),
    ALTER COLUMN text_hash SET NOT NULL,
    ALTER COLUMN embedding TYPE {vector_type},
    ALTER COLUMN embedding SET NOT NULL,
    ALTER COLUMN staged_at SET DEFAULT now();

-- name: create_rejected
-- purpose: Create the table of rejected rows and vectors, each with its reason; a key may be missing.
-- lock: ACCESS SHARE on {table}
-- undo: schema.drop_staging
CREATE TABLE IF NOT EXISTS {rejected} AS
    SELECT {t.key AS own_key}, ''::text AS key_text, ''::text AS reason, ''::text AS detail, now() AS rejected_at
    FROM {table} t WITH NO DATA;
ALTER TABLE {rejected}
    ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    ALTER COLUMN rejected_at SET DEFAULT now();
CREATE INDEX ON {rejected} ({own_key});

-- name: create_queue
-- purpose: Create the queue of rows whose text was inserted or changed; writers only append to it, so none waits.
-- lock: ACCESS SHARE on {table}
-- undo: schema.drop_queue
CREATE TABLE IF NOT EXISTS {queue} AS
    SELECT {t.key AS own_key}, now() AS queued_at FROM {table} t WITH NO DATA;
ALTER TABLE {queue}
    ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    ADD COLUMN claimed_by bigint,
    ADD COLUMN claimed_at timestamptz,
    ADD COLUMN attempts integer NOT NULL DEFAULT 0,
    ADD COLUMN error text,
    {own_key NOT NULL},
    ALTER COLUMN queued_at SET DEFAULT clock_timestamp();
CREATE INDEX ON {queue} ({own_key});

-- name: create_capture_function
-- purpose: Create the function that queues a row. It runs as its owner, so writers need no privileges on the ledger.
-- lock: none on the target
-- undo: schema.drop_capture
CREATE OR REPLACE FUNCTION {capture_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO {queue} ({own_key}) VALUES ({NEW.key});
    RETURN NULL;
END
$$;

-- name: create_triggers
-- purpose: Queue every inserted row, and every row whose text or key changed, byte by byte; other columns queue nothing. ALWAYS: replicated rows are queued too.
-- lock: SHARE ROW EXCLUSIVE on {table}, for milliseconds
-- undo: schema.drop_capture
CREATE TRIGGER {insert_trigger} AFTER INSERT ON {table}
    FOR EACH ROW EXECUTE FUNCTION {capture_function}();
CREATE TRIGGER {update_trigger} AFTER UPDATE ON {table}
    FOR EACH ROW WHEN ({new_text_differs}) EXECUTE FUNCTION {capture_function}();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {insert_trigger};
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {update_trigger};

-- name: drop_triggers
-- purpose: Remove our triggers that are incomplete, disabled or of an earlier release; they are recreated next.
-- lock: ACCESS EXCLUSIVE on {table}, for milliseconds
-- undo: schema.create_triggers
DROP TRIGGER IF EXISTS {insert_trigger} ON {table};
DROP TRIGGER IF EXISTS {update_trigger} ON {table};

-- name: drop_capture
-- purpose: Remove the triggers and their function.
-- lock: ACCESS EXCLUSIVE on {table}, for milliseconds
-- undo: schema.create_triggers
DROP TRIGGER IF EXISTS {insert_trigger} ON {table};
DROP TRIGGER IF EXISTS {update_trigger} ON {table};
DROP FUNCTION IF EXISTS {capture_function}();

-- name: drop_columns
-- purpose: Remove the columns that the runbook added.
-- lock: ACCESS EXCLUSIVE on {table}, for milliseconds; nothing is rewritten
-- undo: schema.add_columns, then load and backfill again
ALTER TABLE {table}
    DROP COLUMN IF EXISTS {embedding},
    DROP COLUMN IF EXISTS {embedding_updated_at},
    DROP COLUMN IF EXISTS {embedding_hash};

-- name: drop_staging
-- purpose: Remove the staging table and the table of rejected vectors.
-- lock: none on the target
-- undo: schema.create_staging, then load again
DROP TABLE IF EXISTS {staging};
DROP TABLE IF EXISTS {rejected};

-- name: drop_queue
-- purpose: Remove the queue of changed rows.
-- lock: none on the target
-- undo: schema.create_queue
DROP TABLE IF EXISTS {queue};

-- name: what_is_there
-- purpose: Which of the runbook's objects exist.
SELECT
    (SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass(%(vectors)s) AND NOT attisdropped
        AND attname = ANY (%(columns)s))::int AS columns,
    to_regclass(%(staging)s) IS NOT NULL AS staging,
    to_regclass(%(rejected)s) IS NOT NULL AS rejected,
    to_regclass(%(queue)s) IS NOT NULL AS queue,
    to_regclass(%(window)s) IS NOT NULL AS window,
    to_regproc(%(capture_function)s) IS NOT NULL AS capture_function,
    (SELECT count(*) FROM pg_trigger WHERE tgrelid = to_regclass(%(table)s) AND NOT tgisinternal
        AND tgname = ANY (%(triggers)s))::int AS triggers,
    (SELECT count(*) FROM pg_trigger WHERE tgrelid = to_regclass(%(table)s) AND NOT tgisinternal
        AND tgenabled = 'A' AND tgname = ANY (%(triggers)s))::int AS firing;

-- name: column_type
-- purpose: The type of the vector column as the catalogue has it, with its dimension.
SELECT format_type(atttypid, atttypmod) AS type FROM pg_attribute
WHERE attrelid = to_regclass(%(table)s) AND attname = %(column)s AND NOT attisdropped;

-- name: catalogue
-- purpose: Everything about the table that a schema comparison covers, one line per object.
SELECT line FROM (
    SELECT 1 AS part, format('column %%s %%s%%s%%s%%s', a.attname, format_type(a.atttypid, a.atttypmod),
        CASE WHEN a.attnotnull THEN ' not null' ELSE '' END,
        ' default ' || pg_get_expr(d.adbin, d.adrelid), ' storage ' || a.attstorage::text) AS line
    FROM pg_attribute a LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    WHERE a.attrelid = to_regclass(%(table)s) AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT 2, format('index %%s%%s', pg_get_indexdef(indexrelid), CASE WHEN indisvalid THEN '' ELSE ' (invalid)' END)
    FROM pg_index WHERE indrelid = to_regclass(%(table)s)
    UNION ALL
    SELECT 3, format('constraint %%s %%s', conname, pg_get_constraintdef(oid))
    FROM pg_constraint WHERE conrelid = to_regclass(%(table)s)
    UNION ALL
    SELECT 4, format('trigger %%s %%s', tgenabled, pg_get_triggerdef(oid))
    FROM pg_trigger WHERE tgrelid = to_regclass(%(table)s) AND NOT tgisinternal
    UNION ALL
    SELECT 5, format('table owner %%s, options %%s, grants %%s, replica identity %%s, row security %%s',
        pg_get_userbyid(relowner), reloptions, relacl, relreplident, relrowsecurity)
    FROM pg_class WHERE oid = to_regclass(%(table)s)
    UNION ALL
    SELECT 6, format('comment %%s %%s', objsubid, description)
    FROM pg_description WHERE objoid = to_regclass(%(table)s) AND classoid = 'pg_class'::regclass
    UNION ALL
    SELECT 7, format('function %%s.%%s(%%s)', pronamespace::regnamespace, proname, pg_get_function_identity_arguments(oid))
    FROM pg_proc
    WHERE pronamespace = to_regnamespace(%(schema)s) AND proname = %(function)s
    UNION ALL
    SELECT 8, format('extension %%s', extname) FROM pg_extension WHERE extname = 'vector'
    UNION ALL
    SELECT 9, format('referenced by %%s.%%s %%s', c.relnamespace::regnamespace, c.relname, f.conname)
    FROM pg_constraint f JOIN pg_class c ON c.oid = f.conrelid
    WHERE f.confrelid = to_regclass(%(table)s) AND f.contype = 'f'
) lines ORDER BY part, line;
