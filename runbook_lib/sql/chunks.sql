-- Vectors of chunks: a side table with a row for each chunk of a text. All chunks of a row have the hash of its whole
-- text, and are written and replaced in one transaction.

-- name: create
-- purpose: Create the table for the vectors of chunks; deleting a row deletes its chunks.
-- lock: SHARE ROW EXCLUSIVE on {table}, for milliseconds
-- undo: sidetable.drop
CREATE TABLE {vectors} AS
    SELECT {t.key}, 0 AS {chunk}, 0 AS {chunk_start}, 0 AS {chunk_length}, NULL::{vector_type} AS {embedding},
           now() AS {embedding_updated_at}, NULL::bytea AS {embedding_hash}
    FROM {table} t WITH NO DATA;
ALTER TABLE {vectors}
    ADD PRIMARY KEY ({key}, {chunk}),
    ALTER COLUMN {chunk_start} SET NOT NULL,
    ALTER COLUMN {chunk_length} SET NOT NULL,
    ALTER COLUMN {embedding} TYPE {vector_type},
    ALTER COLUMN {embedding} SET NOT NULL,
    ALTER COLUMN {embedding_hash} SET NOT NULL,
    ADD CONSTRAINT {foreign_key} FOREIGN KEY ({key}) REFERENCES {table} ({key}) ON DELETE CASCADE ON UPDATE CASCADE;
-- closed to everybody but its owner
{grants};

-- name: create_staging
-- purpose: Create the staging table: one row per chunk, with its place in the text, its vector and the hash of the whole text.
-- lock: ACCESS SHARE on {table}
-- undo: schema.drop_staging
CREATE TABLE IF NOT EXISTS {staging} AS
    SELECT {t.key AS own_key}, NULL::bytea AS text_hash, NULL::{vector_type} AS embedding, now() AS staged_at,
           0 AS chunk, 0 AS chunk_start, 0 AS chunk_length
    FROM {table} t WITH NO DATA;
ALTER TABLE {staging}
    ADD PRIMARY KEY ({own_key}, chunk),
    ALTER COLUMN text_hash SET NOT NULL,
    ALTER COLUMN embedding TYPE {vector_type},
    ALTER COLUMN embedding SET NOT NULL,
    ALTER COLUMN staged_at SET DEFAULT now(),
    ALTER COLUMN chunk_start SET NOT NULL,
    ALTER COLUMN chunk_length SET NOT NULL;

-- name: upsert
-- purpose: Replace the chunks of each row of a batch by those staged, if its text is still the text that was embedded.
-- lock: ROW EXCLUSIVE on the table of chunks; ROW SHARE on {table}, on the rows of one batch, until its commit
-- undo: sidetable.drop
WITH unchanged AS MATERIALIZED (
    SELECT {t.key AS own_key} FROM {table} t JOIN {staging} s ON {s.own_key = t.key} AND s.chunk = 0
    LEFT JOIN {vectors} e ON {e.key = t.key} AND e.{chunk} = 0
    WHERE {s.own_key IN %keys} AND s.text_hash = {text_hash} AND e.{embedding_hash} IS DISTINCT FROM s.text_hash
    FOR SHARE OF t
), cut_off AS (
    DELETE FROM {vectors} e USING unchanged u WHERE {e.key = u.own_key}
        AND NOT EXISTS (SELECT FROM {staging} s WHERE {s.own_key = u.own_key} AND s.chunk = e.{chunk})
), written AS (
    INSERT INTO {vectors} ({key}, {chunk}, {chunk_start}, {chunk_length}, {embedding}, {embedding_hash}, {embedding_updated_at})
    SELECT {s.own_key}, s.chunk, s.chunk_start, s.chunk_length, s.embedding, s.text_hash, now()
    FROM {staging} s JOIN unchanged u ON {u.own_key = s.own_key}
    ON CONFLICT ({key}, {chunk}) DO UPDATE
    SET {embedding} = excluded.{embedding}, {embedding_hash} = excluded.{embedding_hash},
        {embedding_updated_at} = excluded.{embedding_updated_at},
        {chunk_start} = excluded.{chunk_start}, {chunk_length} = excluded.{chunk_length}
)
SELECT {own_key} FROM unchanged;

-- name: copy
-- purpose: COPY the vectors of chunks into the staging table, in binary, all chunks of a row in one transaction.
-- lock: ROW EXCLUSIVE on the staging table; none on the target
-- undo: schema.drop_staging
COPY {staging} ({own_key}, text_hash, embedding, chunk, chunk_start, chunk_length) FROM STDIN (FORMAT BINARY);

-- name: nearest_chunk
-- purpose: Part of the searches: the nearest chunk of the row t.
LATERAL (
    SELECT b.* FROM {vectors} b WHERE {b.key = t.key}
    ORDER BY (b.{embedding} {distance} {query_vector}) + 0, b.{chunk} LIMIT 1
) e ON true

-- name: rows_through_the_index
-- purpose: Part of the searches: the rows of the nearest chunks; where these are of too few rows, of the next ones too. A LIMIT on chunks alone would return as few rows as have many near chunks.
(
    WITH RECURSIVE found (keys) AS (
        SELECT array_agg(DISTINCT c.key) FROM (
            SELECT {one t.key AS key} FROM {from_all_vectors}
            WHERE {filters} AND {row_embedding} IS NOT NULL
            ORDER BY {nearest_first} LIMIT {chunks}
        ) c
        UNION ALL
        SELECT f.keys || more.keys
        FROM found f CROSS JOIN LATERAL (
            SELECT array_agg(DISTINCT c.key) AS keys FROM (
                SELECT {one t.key AS key} FROM {from_all_vectors}
                WHERE {filters} AND {row_embedding} IS NOT NULL AND {one t.key} <> ALL (f.keys)
                ORDER BY {nearest_first} LIMIT {chunks}
            ) c
        ) more
        WHERE cardinality(f.keys) < {fetched} AND more.keys IS NOT NULL
    )
    SELECT unnest(last.keys) AS key FROM (SELECT keys FROM found ORDER BY cardinality(keys) DESC LIMIT 1) last
) near JOIN {table} t ON {t.key = one near.key} JOIN {nearest_chunk}

-- name: passage
-- purpose: Part of the function that the application calls: where the nearest chunk of each row is in its text.
LEFT JOIN LATERAL (
    SELECT b.{chunk_start} AS chunk_start, b.{chunk_length} AS chunk_length FROM {vectors} b
    WHERE {b.key = answer.own_key} AND query_embedding IS NOT NULL
    ORDER BY (b.{embedding} {distance} query_embedding::{vector_type}) + 0, b.{chunk} LIMIT 1
) passage ON true
