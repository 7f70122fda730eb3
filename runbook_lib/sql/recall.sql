-- What an index finds, while others on the same column are there too.

-- name: at_most
-- purpose: How long each statement of this transaction may take, in ms.
SELECT set_config('statement_timeout', %(ms)s, true);

-- name: hide
-- purpose: Hide an index from this transaction only, which is rolled back after a few queries.
-- lock: ACCESS EXCLUSIVE on {vectors}, for milliseconds
-- undo: its own rollback
DROP INDEX {hidden};
