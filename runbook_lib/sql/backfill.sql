-- Phase 50: from the staging table into the column.

-- name: window
-- purpose: The last key of the next window of staged rows.
SELECT max(key) AS last, count(*) AS staged FROM (
    SELECT s.key FROM {staging} s WHERE {after} ORDER BY s.key LIMIT %(batch_rows)s
) w;

-- name: update
-- purpose: Give each row of a window its vector, if its text is still the one that the vector was made from.
-- lock: ROW EXCLUSIVE on {table}, on the rows of one batch, until its commit
-- undo: schema.drop_columns
UPDATE {table} t
SET {embedding} = s.embedding, {embedding_hash} = s.text_hash, {embedding_updated_at} = now()
FROM {staging} s
WHERE s.key = t.{key} AND {after} AND s.key <= %(last_of_window)s
  AND s.text_hash = {text_hash}
  AND t.{embedding_hash} IS DISTINCT FROM s.text_hash;

-- name: left
-- purpose: Rows that still want a vector, counted by their texts as they are now.
SELECT count(*) FILTER (WHERE has_text AND bare) AS missing,
       count(*) FILTER (WHERE NOT bare AND (old OR NOT has_text)) AS stale,
       count(*) FILTER (WHERE has_text) AS with_text
FROM (
    SELECT t.{embedding} IS NULL AS bare, btrim({text}, E' \t\r\n') <> '' AS has_text,
           t.{embedding_hash} IS DISTINCT FROM {text_hash} AS old
    FROM {table} t
) x;

-- name: clear_textless
-- purpose: Take the vector from rows whose text is gone.
-- lock: ROW EXCLUSIVE on {table}, on those rows
-- undo: none needed; there is no text to search
UPDATE {table} t SET {embedding} = NULL, {embedding_hash} = NULL, {embedding_updated_at} = now()
WHERE t.{embedding} IS NOT NULL AND btrim({text}, E' \t\r\n') = '';

-- name: queued
-- purpose: Changes that wait.
SELECT count(*) AS changes, count(DISTINCT key) AS rows FROM {queue};
