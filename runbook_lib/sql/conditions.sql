-- What a search is filtered by.

-- name: types
-- purpose: The types of the conditions' values, as the parameters name them, without lengths.
SELECT w.name, CASE n.nspname WHEN 'pg_catalog' THEN format_type(t.oid, -1) ELSE format('%%I.%%I', n.nspname, t.typname) END AS type
FROM unnest(%(names)s::text[], %(types)s::text[]) AS w (name, type)
JOIN pg_type t ON t.oid = to_regtype(w.type)
JOIN pg_namespace n ON n.oid = t.typnamespace;

-- name: column_types
-- purpose: The types of the key and the filters, without lengths, to which a cast would truncate; and the equality
-- operator of each type's default btree operator class, or PostgreSQL's for types without one, such as enums and varchar.
WITH RECURSIVE wanted AS (
    SELECT a.attname AS name, a.atttypid AS type FROM pg_attribute a
    WHERE a.attrelid = to_regclass(%(table)s) AND a.attname = ANY (%(columns)s) AND NOT a.attisdropped
), base AS (
    SELECT name, type FROM wanted
    UNION ALL
    SELECT b.name, t.typbasetype FROM base b JOIN pg_type t ON t.oid = b.type WHERE t.typtype = 'd'
)
SELECT w.name,
       CASE n.nspname WHEN 'pg_catalog' THEN format_type(t.oid, -1) ELSE format('%%I.%%I', n.nspname, t.typname) END AS type,
       coalesce(
           (SELECT format('OPERATOR(%%I.%%s)', s.nspname, o.oprname) FROM base b
            JOIN pg_opclass c ON c.opcintype = b.type AND c.opcdefault
            JOIN pg_am am ON am.oid = c.opcmethod AND am.amname = 'btree'
            JOIN pg_amop ao ON ao.amopfamily = c.opcfamily AND ao.amopstrategy = 3
                           AND ao.amoplefttype = c.opcintype AND ao.amoprighttype = c.opcintype
            JOIN pg_operator o ON o.oid = ao.amopopr JOIN pg_namespace s ON s.oid = o.oprnamespace
            WHERE b.name = w.name LIMIT 1),
           'OPERATOR(pg_catalog.=)') AS equals
FROM wanted w JOIN pg_type t ON t.oid = w.type JOIN pg_namespace n ON n.oid = t.typnamespace;

-- name: rows_let_through
-- purpose: How many rows the planner expects to match the filters; it reads none.
EXPLAIN SELECT FROM {table} t WHERE {filters};

-- name: rows_in_all
-- purpose: The planner's estimate of the table's rows.
EXPLAIN SELECT FROM {table} t;
