-- What only the vector index of a partitioned table needs: PostgreSQL builds, attaches and drops it in other ways.

-- name: create_bracket_hnsw
-- purpose: Create the HNSW index of the partitioned table itself: it holds no rows, and becomes valid with its last partition.
-- lock: SHARE on {relation} alone, for milliseconds
-- undo: index_partitions.drop_bracket
CREATE INDEX {index} ON ONLY {relation} USING hnsw ({indexed} {operator_class})
    WITH (m = {m}, ef_construction = {ef_construction}){of_rows};

-- name: create_bracket_ivfflat
-- purpose: Create the IVFFlat index of the partitioned table itself: it holds no rows, and becomes valid with its last partition.
-- lock: SHARE on {relation} alone, for milliseconds
-- undo: index_partitions.drop_bracket
CREATE INDEX {index} ON ONLY {relation} USING ivfflat ({indexed} {operator_class}) WITH (lists = {lists}){of_rows};

-- name: attach
-- purpose: Attach a partition's index to its parent's; one that is attached already is left alone.
-- lock: ACCESS EXCLUSIVE on the index of {relation}, for milliseconds; who reads or writes that partition has it open
-- undo: index_partitions.drop_bracket
ALTER INDEX {parent_index} ATTACH PARTITION {index};

-- name: drop_bracket
-- purpose: Drop the partitioned index with those of all partitions; PostgreSQL cannot do this concurrently.
-- lock: ACCESS EXCLUSIVE on {relation} and every partition of it, for milliseconds
-- undo: index_partitions.create_bracket_hnsw, then each partition's
DROP INDEX IF EXISTS {dropped};

-- name: reindex
-- purpose: Rebuild the invalid index of one partition in place.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}, for the whole build; it waits for older transactions to end
-- undo: none needed; the index has the rows that it had
REINDEX INDEX CONCURRENTLY {index};
