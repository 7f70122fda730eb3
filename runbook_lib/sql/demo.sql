-- The demo's own schema: a table as applications have it, with the search of before.

-- name: owner
-- purpose: Who made the schema demo, by its comment; no row where there is none.
SELECT coalesce(obj_description(oid, 'pg_namespace'), '') AS made_by FROM pg_namespace WHERE nspname = 'demo';

-- name: create_database
-- purpose: Create the demo's database, in a locale that is the same on every machine and folds case fast.
-- lock: none
-- undo: DROP DATABASE
CREATE DATABASE {database} TEMPLATE template0 LOCALE 'C' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8';

-- name: drop_schema
-- purpose: Remove the demo data of an earlier run.
-- lock: ACCESS EXCLUSIVE on the demo's own tables
-- undo: load the demo again
DROP SCHEMA IF EXISTS demo CASCADE;

-- name: create_extensions
-- purpose: Install what the legacy search and the search for legacy queries need.
-- lock: none
-- undo: DROP EXTENSION pg_trgm, pg_stat_statements
CREATE EXTENSION IF NOT EXISTS pg_trgm;
CREATE EXTENSION IF NOT EXISTS pg_stat_statements;

-- name: create_schema
-- purpose: Create the demo's own schema, marked as such.
-- lock: none
-- undo: demo.drop_schema
CREATE SCHEMA demo;
COMMENT ON SCHEMA demo IS {mark};

-- name: create_table
-- purpose: Create the table, with the tsvector column of a legacy full text search and MITRE's notice.
-- lock: none
-- undo: demo.drop_schema
CREATE TABLE demo.articles (
    id         bigint PRIMARY KEY,
    title      text NOT NULL,
    body       text NOT NULL,
    status     text NOT NULL,
    category   text NOT NULL,
    created_at timestamptz NOT NULL,
    views      integer NOT NULL DEFAULT 0,
    tsv        tsvector NOT NULL GENERATED ALWAYS AS (
        setweight(to_tsvector('english', title), 'A') || setweight(to_tsvector('english', body), 'B')
    ) STORED
);
COMMENT ON TABLE demo.articles IS {notice};

-- name: copy
-- purpose: Load the rows.
-- lock: ROW EXCLUSIVE on the demo's own table
-- undo: demo.drop_schema
COPY demo.articles (id, title, body, status, category, created_at) FROM STDIN;

-- name: create_indexes
-- purpose: Create the indexes that a legacy search has, after the rows are in.
-- lock: SHARE on the demo's own table
-- undo: demo.drop_schema
CREATE INDEX articles_title_trgm ON demo.articles USING gin (title gin_trgm_ops);
CREATE INDEX articles_body_trgm ON demo.articles USING gin (body gin_trgm_ops);
CREATE INDEX articles_tsv ON demo.articles USING gin (tsv);
CREATE INDEX articles_status ON demo.articles (status);
CREATE INDEX articles_category ON demo.articles (category);

-- name: vacuum
-- purpose: Leave the table as on a server that has run for a while: visibility map set, statistics collected.
-- lock: SHARE UPDATE EXCLUSIVE on the demo's own table
-- undo: none needed
VACUUM (ANALYZE) demo.articles;
