-- The vector index rebuilt while the old one serves, proved, and swapped in.

-- name: drop
-- purpose: Drop an index that is no longer used, or that an unfinished build left behind.
-- lock: SHARE UPDATE EXCLUSIVE on {relation}; it waits for older transactions that use the index
-- undo: undo/rebuild_index builds it again
DROP INDEX CONCURRENTLY IF EXISTS {dropped};

-- name: swap
-- purpose: Give the proved index the name of the one in use, in one transaction.
-- lock: SHARE UPDATE EXCLUSIVE on both indexes, for milliseconds
-- undo: rebuild.swap_back
ALTER INDEX {renamed} RENAME TO {name};

-- name: swap_back
-- purpose: Give the former index its name back, in one transaction.
-- lock: SHARE UPDATE EXCLUSIVE on both indexes, for milliseconds
-- undo: rebuild.swap
ALTER INDEX {renamed} RENAME TO {name};

-- name: definition
-- purpose: The search function and the functions it calls for each route, as statements that recreate them.
SELECT string_agg(pg_get_functiondef(p.oid), E';\n' ORDER BY p.pronamespace = to_regnamespace(%(schema)s), p.proname) AS definition
FROM pg_proc p
WHERE p.pronamespace = to_regnamespace(%(ledger)s) AND p.proname = ANY (%(by_route)s)
   OR p.pronamespace = to_regnamespace(%(schema)s) AND p.proname = %(function)s AND {is_called};
