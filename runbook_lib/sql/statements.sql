-- What pg_stat_statements has counted: the searches of today, found by their text. All of it only reads.

-- name: source
-- purpose: The schema and features of pg_stat_statements, and whether it is counting.
SELECT n.nspname::text AS schema, e.extversion AS version,
       to_regclass(format('%%I.pg_stat_statements_info', n.nspname)) IS NOT NULL AS has_info,
       EXISTS (SELECT FROM pg_attribute a
               WHERE a.attrelid = to_regclass(format('%%I.pg_stat_statements', n.nspname))
                 AND a.attname = 'mean_exec_time') AS has_exec_time,
       current_setting('pg_stat_statements.track', true) AS track,
       current_setting('pg_stat_statements.max', true)::int AS most
FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
WHERE e.extname = 'pg_stat_statements';

-- name: searches
-- purpose: Statements on this table that look like a search, the most frequent first; not the runbook's own.
SELECT s.queryid::text AS id, sum(s.calls)::bigint AS calls,
       (sum(s.{mean_ms} * s.calls) / greatest(sum(s.calls), 1))::float8 AS mean_ms, min(s.query) AS text
FROM {statements} s
WHERE s.dbid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
  AND position(lower(%(table_name)s) IN lower(s.query)) > 0
  AND s.query ~* %(reads)s AND (s.query ~* %(searches)s OR s.query ~* %(near_text)s) AND s.query !~* %(own)s
GROUP BY s.queryid ORDER BY 2 DESC, 4 LIMIT %(rows)s::bigint;

-- name: counted
-- purpose: Statements of this database whose text is hidden from this role; all entries, and their calls.
SELECT count(*) FILTER (WHERE s.query = '<insufficient privilege>' AND d.datname = current_database()) AS hidden,
       count(*) AS entries, coalesce(sum(s.calls), 0)::bigint AS calls
FROM {statements} s LEFT JOIN pg_database d ON d.oid = s.dbid;

-- name: since
-- purpose: Since when statements are counted, and how often entries were evicted.
SELECT extract(epoch FROM i.stats_reset)::float8 AS reset_s, i.dealloc AS thrown_out FROM {statements_info} i;
