-- Phase 90: what the canary looks at beside its own calls.

-- name: now
-- purpose: The server's clock, which the log of live calls goes by.
SELECT clock_timestamp() AS now;
