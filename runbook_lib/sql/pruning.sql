-- Phase 50: when the server tidies a page.

-- name: fillfactor
-- purpose: The fillfactor that is set on a relation itself.
SELECT (SELECT o.option_value FROM pg_class c, pg_options_to_table(c.reloptions) o
        WHERE c.oid = to_regclass(%(part)s) AND o.option_name = 'fillfactor') AS fillfactor;

-- name: set
-- purpose: Set the fillfactor, which also decides how early a page is pruned.
-- lock: SHARE UPDATE EXCLUSIVE on {part}
-- undo: pruning.restore_plan
ALTER TABLE {part} SET (fillfactor = {value});

-- name: reset
-- purpose: Remove the fillfactor setting again.
-- lock: SHARE UPDATE EXCLUSIVE on {part}
-- undo: none needed
ALTER TABLE {part} RESET (fillfactor);
