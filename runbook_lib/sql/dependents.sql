-- Who and what depends on the table, and would notice new columns or every row updated. All of it reads.

-- name: publications
-- purpose: Publications that send the table or a partition of it; columns: do they send those that are added later?
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
), sent AS (
    SELECT p.pubname, bool_or(p.puballtables) AS all_tables,
           bool_or(r.prrelid IS NULL OR to_jsonb(r) -> 'prattrs' IN ('null')
                   OR to_jsonb(r) -> 'prattrs' IS NULL) AS columns
    FROM part JOIN pg_class c ON c.oid = part.oid JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_publication_tables t ON (t.schemaname, t.tablename) = (n.nspname, c.relname)
    JOIN pg_publication p ON p.pubname = t.pubname
    LEFT JOIN (pg_publication_rel r JOIN part o ON o.oid = r.prrelid) ON r.prpubid = p.oid
    GROUP BY p.pubname
)
SELECT pubname::text AS name, quote_ident(pubname) AS shown, all_tables, columns FROM sent ORDER BY 1;

-- name: publications_of_new_tables
-- purpose: Publications that include every new table of the database, or of a schema that the runbook uses.
SELECT p.pubname::text AS name, quote_ident(p.pubname) AS shown, p.puballtables AS all_tables,
       {in_schemas} AS schemas
FROM pg_publication p WHERE p.puballtables OR {in_schemas} <> '{{}}' ORDER BY 1;

-- name: slots
-- purpose: Logical replication slots of this database, with their readers.
SELECT s.slot_name::text AS name, s.plugin::text AS plugin, s.active FROM pg_replication_slots s
WHERE s.database = current_database() AND s.slot_type = 'logical' AND NOT s.temporary ORDER BY 1;

-- name: subscriptions
-- purpose: Subscriptions of this database that write into the table or a partition of it.
WITH RECURSIVE part AS (
    SELECT to_regclass(%(table)s)::oid AS oid
    UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
)
-- Of pg_subscription itself, only superusers may read the oid before PostgreSQL 14.
SELECT DISTINCT s.subname::text AS name FROM pg_subscription_rel r JOIN pg_stat_subscription s ON s.subid = r.srsubid
WHERE r.srrelid IN (SELECT oid FROM part) ORDER BY 1;

-- name: table
-- purpose: What kind of table it is beyond an ordinary one.
SELECT c.relpersistence::text AS persistence, c.relnatts AS columns, c.relhassubclass AND c.relkind = 'r' AS parent,
    nullif(c.reloftype, 0)::regtype::text AS of_type,
    ARRAY(SELECT i.inhrelid::regclass::text FROM pg_inherits i JOIN pg_class k ON k.oid = i.inhrelid
          WHERE i.inhparent = c.oid AND NOT k.relispartition ORDER BY 1) AS children,
    EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND (i.indisprimary OR i.indisreplident)) AS identified,
    (SELECT min(l.collname::text) FROM pg_attribute a JOIN pg_collation l ON l.oid = a.attcollation
     WHERE a.attrelid = c.oid AND a.attname = ANY (%(key)s) AND NOT l.collisdeterministic) AS blind_key
FROM pg_class c WHERE c.oid = to_regclass(%(table)s);

-- name: row_functions
-- purpose: Functions in SQL whose result is a row of the table.
SELECT p.oid::bigint AS oid, p.oid::regprocedure::text AS name FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
WHERE p.prorettype = (SELECT c.reltype FROM pg_class c WHERE c.oid = to_regclass(%(table)s)) AND l.lanname = 'sql'
ORDER BY 2;

-- name: validate
-- purpose: Have PostgreSQL check the function again, as CREATE FUNCTION does.
SELECT fmgr_sql_validator(%(oid)s::oid);

-- name: filter
-- purpose: Can PostgreSQL compare, group and sort by this column? No row is read.
SELECT DISTINCT t.{column} FROM {table} t WHERE t.{column} = NULL::{type} ORDER BY 1 LIMIT 0;
