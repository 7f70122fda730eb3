-- Phase 90: what the canary looks at besides its own calls.

-- name: now
-- purpose: The server's clock, which times the log of live calls.
SELECT clock_timestamp() AS now;
