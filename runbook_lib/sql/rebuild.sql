-- The vector index built again beside the one that serves, proved, and put into its place.

-- name: drop
-- purpose: Drop an index that serves no longer, or that an unfinished build left over.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}; it waits for older transactions that use the index
-- undo: rebuild.undo builds it again
DROP INDEX CONCURRENTLY IF EXISTS {dropped};

-- name: swap
-- purpose: Give the proved index the name of the one that served, in one transaction.
-- lock: SHARE UPDATE EXCLUSIVE on both indexes, for milliseconds
-- undo: rebuild.swap_back
ALTER INDEX {renamed} RENAME TO {name};

-- name: swap_back
-- purpose: Give the index that served before its name again, in one transaction.
-- lock: SHARE UPDATE EXCLUSIVE on both indexes, for milliseconds
-- undo: rebuild.swap
ALTER INDEX {renamed} RENAME TO {name};

-- name: definition
-- purpose: The search function as a statement that makes it again.
SELECT pg_get_functiondef(p.oid) AS definition FROM pg_proc p
WHERE p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s AND {of_trusted_owner};
