-- Operate 50: what an index could hold, compared on the table's own rows.

-- name: create_scratch
-- purpose: Create the scratch table for a sample of the vectors; unlogged, so no replica has to copy it.
-- lock: none on the target
-- undo: storage.drop_scratch
CREATE UNLOGGED TABLE {scratch} WITH (autovacuum_enabled = off) AS
    SELECT {t.key}, {row_embedding} AS {embedding} FROM {from_vectors} WITH NO DATA;
ALTER TABLE {scratch} ADD PRIMARY KEY ({key});

-- name: fill_scratch
-- purpose: Copy vectors of random pages, and those of every judged row, into the scratch table.
-- lock: none on the target
-- undo: storage.drop_scratch
INSERT INTO {scratch} ({key}, {embedding})
(SELECT {t.key}, {row_embedding} FROM {from_vectors}
 WHERE {row_embedding} IS NOT NULL AND {t.key IN typed %judged})
UNION ALL
(SELECT {t.key}, {row_embedding} FROM {from_vectors}
 WHERE {row_embedding} IS NOT NULL
   AND {row t.key} IN (SELECT {s.key} FROM {table} AS s TABLESAMPLE SYSTEM (%(percent)s))
 LIMIT %(rows)s)
ON CONFLICT DO NOTHING;

-- name: drop_scratch
-- purpose: Drop the scratch table and the indexes on it.
-- lock: none on the target
-- undo: run operate/compare_storage again
DROP TABLE IF EXISTS {scratch};

-- name: drop_index
-- purpose: Drop an index that was built to be measured.
-- lock: SHARE UPDATE EXCLUSIVE on {vectors}; it waits for older transactions that use the index
-- undo: run operate/compare_storage again
DROP INDEX CONCURRENTLY IF EXISTS {measured_index};

-- name: analyze
-- purpose: Tell the planner how many rows the scratch table has.
ANALYZE {scratch};

-- name: leftovers
-- purpose: What an earlier comparison left: its scratch table, and its indexes on the column.
SELECT to_regclass(%(scratch)s) IS NOT NULL AS scratch,
       ARRAY(SELECT c.relname::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
             WHERE i.indrelid = to_regclass(%(vectors)s) AND c.relname LIKE %(prefix)s ORDER BY 1) AS indexes;

-- name: rows
-- purpose: Rows with a vector.
SELECT count(*) AS rows FROM {vectors} t WHERE t.{embedding} IS NOT NULL;

-- name: bytes
-- purpose: Size of an index, and whether queries can use it.
SELECT pg_relation_size(i.indexrelid) AS bytes, i.indisvalid AND i.indisready AS usable
FROM pg_index i WHERE i.indexrelid = to_regclass(%(index)s);

-- name: first_dimensions
-- purpose: The nearest rows by the first dimensions alone, sorted again by the full vectors.
WITH nearest AS MATERIALIZED (
    SELECT {t.key AS own_key}, {row_embedding} {distance} {query_vector} AS distance
    FROM {from_vectors}
    WHERE {row_embedding} IS NOT NULL
    ORDER BY {row_part} {distance} {query_part}
    LIMIT {nearest_rows}
)
SELECT {own_key}, -distance AS score FROM nearest ORDER BY distance + 0 LIMIT %(k)s;
