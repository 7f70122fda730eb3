-- Judgements against the table.

-- name: known_keys
-- purpose: Which of these keys the table holds, as text; found through the key's index.
SELECT {one t.key}::text AS key FROM {table} t WHERE {t.key IN typed %keys};
