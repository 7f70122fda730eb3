-- Phase 60 on a partitioned table: an index on the parent that is no more than a bracket, one on each partition.

-- name: create_bracket_hnsw
-- purpose: Make the HNSW index of a partitioned table itself: it holds no row, and turns valid with its last partition.
-- lock: SHARE on {relation} alone, for milliseconds
-- undo: index_partitions.drop_bracket
CREATE INDEX {new_index} ON ONLY {relation} USING hnsw ({indexed} {operator_class})
    WITH (m = {m}, ef_construction = {ef_construction});

-- name: create_bracket_ivfflat
-- purpose: Make the IVFFlat index of a partitioned table itself: it holds no row, and turns valid with its last partition.
-- lock: SHARE on {relation} alone, for milliseconds
-- undo: index_partitions.drop_bracket
CREATE INDEX {new_index} ON ONLY {relation} USING ivfflat ({indexed} {operator_class}) WITH (lists = {lists});

-- name: create_hnsw
-- purpose: Build the HNSW index of one partition beside the running application.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}, for the whole build; it waits for older transactions to end
-- undo: index_partitions.drop
CREATE INDEX CONCURRENTLY {new_index} ON {relation} USING hnsw ({indexed} {operator_class})
    WITH (m = {m}, ef_construction = {ef_construction});

-- name: create_ivfflat
-- purpose: Build the IVFFlat index of one partition beside the running application.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}, for the whole build; it waits for older transactions to end
-- undo: index_partitions.drop
CREATE INDEX CONCURRENTLY {new_index} ON {relation} USING ivfflat ({indexed} {operator_class})
    WITH (lists = {lists});

-- name: attach
-- purpose: Make a partition's index part of its parent's; what is attached already is left alone.
-- lock: ACCESS EXCLUSIVE on the index of {relation}, for milliseconds; who reads or writes that partition has it open
-- undo: index_partitions.drop_bracket
ALTER INDEX {parent_index} ATTACH PARTITION {part_index};

-- name: drop
-- purpose: Drop the index of one partition that is part of no other, or what an unfinished build left of it.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}; it waits for older transactions that use the index
-- undo: index_partitions.create_hnsw
DROP INDEX CONCURRENTLY IF EXISTS {part_index};

-- name: drop_bracket
-- purpose: Drop the partitioned index with that of every partition; PostgreSQL cannot do this concurrently.
-- lock: ACCESS EXCLUSIVE on {relation} and every partition of it, for milliseconds
-- undo: index_partitions.create_bracket_hnsw, then each partition's
DROP INDEX IF EXISTS {part_index};

-- name: reindex
-- purpose: Build the index of one partition anew, beside the one that serves, which it then replaces.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}, for the whole build; it waits for older transactions to end
-- undo: none needed; the index has the rows that it had
REINDEX INDEX CONCURRENTLY {part_index};

-- name: set_options
-- purpose: Give the index of one partition the options that its next build follows.
-- lock: ACCESS EXCLUSIVE on the index of {relation}, for milliseconds; who reads or writes that partition has it open
-- undo: index_partitions.set_options with the former ones
ALTER INDEX {part_index} SET ({options});

-- name: rows
-- purpose: Rows of one partition that its index should hold.
SELECT count(*) AS rows FROM {relation} t WHERE t.{embedding} IS NOT NULL;
