-- Phases 70 and 80: how the searches are measured.

-- name: exact_only
-- purpose: Use no index in this transaction, so that the answers are exact.
SELECT set_config('enable_indexscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('enable_indexonlyscan', 'off', true);
