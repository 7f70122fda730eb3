-- Rows whose text was inserted or changed since they were embedded.

-- name: take
-- purpose: Take the oldest changes out of the queue; what another worker holds is passed over.
-- lock: ROW EXCLUSIVE on the queue
-- undo: a rollback puts them back
DELETE FROM {queue} WHERE id IN (
    SELECT id FROM {queue} ORDER BY id LIMIT %(batch_rows)s FOR UPDATE SKIP LOCKED
) RETURNING key;

-- name: texts
-- purpose: The texts of these rows as they are now, where the vector is not of that text.
SELECT t.{key} AS key, {text} AS text, {text_hash} AS text_hash, btrim({text}, E' \t\r\n') <> '' AS has_text
FROM {table} t
WHERE t.{key} = ANY (%(keys)s) AND (t.{embedding} IS NULL OR t.{embedding_hash} IS DISTINCT FROM {text_hash});

-- name: update
-- purpose: Give each row its vector, if its text is still the one that the vector was made from.
-- lock: ROW EXCLUSIVE on {table}, on the rows of one batch, until its commit
-- undo: schema.drop_columns
UPDATE {table} t
SET {embedding} = %(embedding)s, {embedding_hash} = %(text_hash)s, {embedding_updated_at} = now()
WHERE t.{key} = %(key)s AND {text_hash} = %(text_hash)s;

-- name: clear
-- purpose: Take the vector from a row whose text is gone.
-- lock: ROW EXCLUSIVE on {table}, on that row
-- undo: none needed; there is no text to search
UPDATE {table} t SET {embedding} = NULL, {embedding_hash} = NULL, {embedding_updated_at} = now()
WHERE t.{key} = %(key)s AND btrim({text}, E' \t\r\n') = '';
