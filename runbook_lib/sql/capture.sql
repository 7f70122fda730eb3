-- Does the capture of changes work? Tried on tables of the runbook's own, in a transaction that is rolled back: no row,
-- no trigger and no rule of the target takes part.

-- name: columns
-- purpose: Columns with their types, and a text that is a valid key of that type.
SELECT a.attname::text AS name, format_type(a.atttypid, a.atttypmod) AS type,
    CASE WHEN t.typname = 'uuid' THEN '00000000-0000-0000-0000-000000000000'
         WHEN t.typcategory = 'N' THEN '-1' ELSE '-' END AS value
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = to_regclass(%(table)s) AND a.attname = ANY (%(columns)s) AND NOT a.attisdropped;

-- name: shape
-- purpose: Make an empty table with the target's key and text columns, in a transaction that is rolled back.
-- lock: ACCESS SHARE on {table}
CREATE TABLE {probe} AS SELECT {probe_columns} FROM {table} t WITH NO DATA;

-- name: insert
-- purpose: Write a test row into the probe table.
INSERT INTO {probe} ({key}) VALUES ({made_up_key});

-- name: change_text
-- purpose: Change a text of the test row.
UPDATE {probe} SET {changed} = 'a';

-- name: write_again
-- purpose: Write the test row again, unchanged.
UPDATE {probe} SET {changed} = {changed};

-- name: arrived
-- purpose: How often the test row is in the queue, as this transaction sees it.
SELECT count(*)::int AS queued FROM {queue} WHERE {is_the_row};

-- name: triggers_of
-- purpose: Definitions of the runbook's triggers on a table: when they fire, on what, and which function they call.
SELECT g.tgname::text AS name, g.tgenabled::text AS enabled,
    replace(pg_get_triggerdef(g.oid), format(' ON %%I.%%I ', n.nspname, c.relname), ' ON ... ') AS definition
FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE g.tgrelid = to_regclass(%(relation)s) AND NOT g.tgisinternal AND g.tgname = ANY (%(triggers)s)
ORDER BY g.tgname;

-- name: functions
-- purpose: The body of the installed function, and of the one just made.
SELECT p.oid = to_regproc(%(function)s) AS serves, p.prosrc AS body, p.prosecdef AS definer, p.proconfig::text AS settings,
    p.provolatile::text AS volatility, l.lanname::text AS language
FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
WHERE p.oid IN (to_regproc(%(function)s), to_regproc(%(probe)s)) ORDER BY 1;
