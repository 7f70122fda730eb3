-- Judgements against the table.

-- name: key_type
-- purpose: The type of the key without its length, which a cast would cut a longer key to.
SELECT format_type(atttypid, -1) AS type FROM pg_attribute
WHERE attrelid = to_regclass(%(table)s) AND attname = %(key)s AND NOT attisdropped;

-- name: known_keys
-- purpose: Which of these keys the table holds, as text; found through the key's index.
SELECT t.{key}::text AS key FROM {table} t WHERE t.{key} = ANY (%(keys)s::{key_type}[]);
