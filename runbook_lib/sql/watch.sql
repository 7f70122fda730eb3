-- Operate 20: what is looked at again and again. All of it only reads.

-- name: size
-- purpose: Rows alive and dead by the statistics, and how often they were vacuumed; partitions are added up.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
SELECT coalesce(sum(pg_stat_get_live_tuples(c.oid)), 0)::bigint AS live,
       coalesce(sum(pg_stat_get_dead_tuples(c.oid)), 0)::bigint AS dead,
       coalesce(sum(pg_stat_get_vacuum_count(c.oid) + pg_stat_get_autovacuum_count(c.oid)), 0)::bigint AS vacuums
FROM part JOIN pg_class c USING (oid) WHERE c.relkind = 'r';

-- name: freshness
-- purpose: Rows whose vector is missing or of an older text, though nothing is queued for them.
SELECT count(*) AS looked_at,
       count(*) FILTER (WHERE has_text) AS with_text,
       count(*) FILTER (WHERE NOT bare) AS with_vector,
       count(*) FILTER (WHERE has_text AND bare AND NOT queued) AS missing,
       count(*) FILTER (WHERE NOT bare AND (old OR NOT has_text) AND NOT queued) AS stale
FROM (
    SELECT {row_embedding} IS NULL AS bare, {has_text} AS has_text,
           {row_embedding_hash} IS DISTINCT FROM {text_hash} AS old,
           EXISTS (SELECT FROM {queue} q WHERE {q.own_key = t.key}) AS queued
    FROM {with_vectors} WHERE {looked_at} AND {is_counted}
) x;

-- name: sampled
-- purpose: Part of the query above: rows of some of the table's pages.
{row t.key} IN (SELECT {s.key} FROM {table} AS s TABLESAMPLE SYSTEM (%(percent)s));

-- name: captured
-- purpose: Does the queue of changes exist?
SELECT to_regclass(%(queue)s) IS NOT NULL AS there;

-- name: no_queue
-- purpose: Part of the freshness query, if nothing is queued because nothing is captured.
(SELECT {t.key AS own_key} WHERE false);

-- name: queue
-- purpose: Changes that wait for a vector, and for how long the oldest has waited.
SELECT count(*) AS changes, coalesce(extract(epoch FROM clock_timestamp() - min(queued_at)), 0)::float8 AS oldest_s
FROM {queue};

-- name: some_vectors
-- purpose: Vectors of rows on random pages; each should be found again, and its neighbours with it.
SELECT {one t.key}::text AS key, {row_embedding} AS embedding FROM {from_vectors}
WHERE {row_embedding} IS NOT NULL AND {looked_at} LIMIT %(n)s;

-- name: scans
-- purpose: Scans of the vector indexes, and calls of the function where the server counts them.
SELECT coalesce((SELECT sum(pg_stat_get_numscans(o)) FROM unnest(%(oids)s::oid[]) AS o), 0)::bigint AS scans,
       coalesce((SELECT sum(pg_relation_size(o)) FROM unnest(%(oids)s::oid[]) AS o), 0)::bigint AS bytes,
       (SELECT sum(calls)::bigint FROM pg_stat_user_functions f
        WHERE f.schemaname = %(schema)s AND f.funcname = %(function)s) AS calls,
       clock_timestamp()::text AS at, extract(epoch FROM clock_timestamp())::float8 AS at_s;

-- name: extension
-- purpose: The installed release of pgvector, and whether the server is one of 32 bits.
SELECT extversion AS version, version() LIKE '%%32-bit%%' AS is_32_bit FROM pg_extension WHERE extname = 'vector';
