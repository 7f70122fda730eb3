-- Vectors in a side table: one row a key.

-- name: create
-- purpose: Create the side table for the vectors; deleting a row deletes its vector.
-- lock: SHARE ROW EXCLUSIVE on {table}, for milliseconds
-- undo: sidetable.drop
CREATE TABLE {vectors} AS
    SELECT {t.key}, NULL::{vector_type} AS {embedding}, now() AS {embedding_updated_at}, NULL::bytea AS {embedding_hash}
    FROM {table} t WITH NO DATA;
ALTER TABLE {vectors}
    ADD PRIMARY KEY ({key}),
    ALTER COLUMN {embedding} TYPE {vector_type},
    ALTER COLUMN {embedding} SET NOT NULL,
    ALTER COLUMN {embedding_hash} SET NOT NULL,
    ADD CONSTRAINT {foreign_key} FOREIGN KEY ({key}) REFERENCES {table} ({key}) ON DELETE CASCADE ON UPDATE CASCADE;
-- closed to everybody but its owner
{grants};

-- name: drop
-- purpose: Remove the side table with its vectors.
-- lock: ACCESS EXCLUSIVE on {table}, for milliseconds, since its foreign key goes with it
-- undo: sidetable.create, then load and backfill again
DROP TABLE IF EXISTS {vectors};

-- name: promote
-- purpose: Rename the staging table to become the side table, and create an empty staging table. No row is copied.
-- lock: ACCESS EXCLUSIVE on {table}, for milliseconds, while the foreign key moves over
-- undo: sidetable.drop
LOCK TABLE {vectors} IN ACCESS EXCLUSIVE MODE;
DELETE FROM {staging} s USING {vectors} e WHERE {s.own_key = e.key};
INSERT INTO {staging} ({own_key}, text_hash, embedding, staged_at{staged_places})
    SELECT {key}, {embedding_hash}, {embedding}, {embedding_updated_at}{places} FROM {vectors};
DROP TABLE {vectors};
{renames};
ALTER TABLE {staging} SET SCHEMA {schema};
ALTER TABLE {moved} RENAME TO {vectors_name};
ALTER TABLE {vectors}
    ADD CONSTRAINT {foreign_key} FOREIGN KEY ({key}) REFERENCES {table} ({key})
    ON DELETE CASCADE ON UPDATE CASCADE NOT VALID;
{grants};
{create_staging};

-- name: delete_orphans
-- purpose: Remove the vectors of rows that were deleted after they were staged.
-- lock: ROW EXCLUSIVE on the side table; none on the target
-- undo: none needed; their rows are gone
DELETE FROM {vectors} e WHERE NOT EXISTS (SELECT FROM {table} t WHERE {t.key = e.key});

-- name: delete_stale
-- purpose: Remove the vectors of texts that changed after they were staged; those rows wait in the queue.
-- lock: ROW EXCLUSIVE on the side table; none on the target
-- undo: none needed; the queue brings their new vectors
DELETE FROM {vectors} e USING {table} t
WHERE {t.key = e.key} AND {row t.key} IN (SELECT {q.own_key} FROM {queue} q) AND e.{embedding_hash} IS DISTINCT FROM {text_hash};

-- name: validate
-- purpose: Check the foreign key for the rows that existed before it.
-- lock: SHARE UPDATE EXCLUSIVE on the side table; ROW SHARE on {table}
-- undo: none needed
ALTER TABLE {vectors} VALIDATE CONSTRAINT {foreign_key};

-- name: analyze
-- purpose: Collect statistics; without them the planner would not choose the index for the join.
-- lock: SHARE UPDATE EXCLUSIVE on the side table; none on the target
-- undo: none needed
ANALYZE {vectors};

-- name: upsert
-- purpose: Give each row of a batch its vector, if its text is still the text that was embedded.
-- lock: ROW EXCLUSIVE on the side table; ROW SHARE on {table}, on the rows of one batch, until its commit
-- undo: sidetable.drop
INSERT INTO {vectors} AS e ({key}, {embedding}, {embedding_hash}, {embedding_updated_at})
SELECT {t.key}, s.embedding, s.text_hash, now() FROM {staging} s JOIN {table} t ON {t.key = s.own_key}
WHERE {s.own_key IN %keys} AND s.text_hash = {text_hash} FOR SHARE OF t
ON CONFLICT ({key}) DO UPDATE
SET {embedding} = excluded.{embedding}, {embedding_hash} = excluded.{embedding_hash},
    {embedding_updated_at} = excluded.{embedding_updated_at}
WHERE e.{embedding_hash} IS DISTINCT FROM excluded.{embedding_hash};

-- name: clear_textless
-- purpose: Remove the vectors of rows whose text is gone.
-- lock: ROW EXCLUSIVE on the side table; none on the target
-- undo: none needed; there is no text to search
DELETE FROM {vectors} e USING {table} t WHERE {t.key = e.key} AND NOT {has_text};

-- name: sizes
-- purpose: Is the side table empty, and is there anything staged?
SELECT NOT EXISTS (SELECT FROM {vectors}) AS empty, EXISTS (SELECT FROM {staging}) AS staged;

-- name: is_validated
-- purpose: Is the foreign key checked for every row?
SELECT convalidated AS validated FROM pg_constraint
WHERE conrelid = to_regclass(%(vectors)s) AND contype = 'f' AND confrelid = to_regclass(%(table)s);

-- name: primary_key
-- purpose: The name of the staging table's primary key.
SELECT conname::text AS name FROM pg_constraint WHERE conrelid = to_regclass(%(staging)s) AND contype = 'p';

-- name: readers
-- purpose: Who may read the table, apart from its owner; NULL is everybody.
SELECT DISTINCT CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee)::text END AS role
FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
WHERE c.oid = to_regclass(%(table)s) AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner ORDER BY 1;
