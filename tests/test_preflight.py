"""Phase 00: bad input is found whole and before anything starts; risks, facts and the plan are told truly."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, Gates
from runbook_lib.core.phase import Phase
from runbook_lib.embeddings import masking
from runbook_lib.migrate import expand_schema, extension, inputs, preflight, table_checks
from runbook_lib.params import Params
from tests.conftest import DSN_ENV

Connection = psycopg.Connection[Any]
MakeParams = Callable[..., Params]
OpenPhase = Callable[..., Phase]


def _failed(gates: Gates) -> list[str]:
    return [g.name for g in gates.failed]


def _only(gates: Gates) -> Gate:
    (g,) = gates.failed
    return g


@pytest.fixture
def role(articles: Connection, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An ordinary role without any rights, which the parameters' DSN uses; removed afterwards."""
    name = "Odd role"
    articles.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    monkeypatch.setenv(DSN_ENV, make_conninfo(database, user=name))
    yield name
    articles.execute(sql.SQL("REASSIGN OWNED BY {r} TO postgres; DROP OWNED BY {r}; DROP ROLE {r}").format(
        r=sql.Identifier(name)))  # fmt: skip


def test_sound_input_passes_and_changes_nothing(articles: Connection, make_params: MakeParams) -> None:
    gates = inputs.input_problems(make_params(target={"filters": ["status"]}))
    assert gates.passed, str(gates)
    assert articles.execute("SELECT FROM pg_namespace WHERE nspname = 'runbook'").fetchone() is None


@pytest.mark.parametrize(
    ("emptied", "found", "do"),
    [
        ("DELETE FROM articles", "no row", "load the rows first"),
        (
            "UPDATE articles SET title = ' ', body = NULL",
            "rows, and no text in title, body",
            "name the columns that hold text in target.text_columns",
        ),
    ],
)
def test_a_table_without_any_text_is_refused_before_anything_starts(
    articles: Connection, make_params: MakeParams, emptied: str, found: str, do: str
) -> None:
    articles.execute(emptied)
    (refused,) = [g for g in inputs.input_problems(make_params()).failed if g.name == "inputs.some_row_has_text"]
    assert str(refused) == (
        'FAIL    inputs.some_row_has_text   "public"."articles"\n'
        f"  found   {found}\n"
        "  needed  a row with text in title, body\n"
        "  danger  there would be nothing to embed or to measure a search with\n"
        f"  do      {do}"
    )


def test_a_table_that_cannot_be_read_is_not_taken_for_one_without_text(
    articles: Connection, make_params: MakeParams, database: str
) -> None:
    with psycopg.connect(database) as holder, db.connect(make_params(), "test") as connection:
        holder.execute("LOCK TABLE articles")
        connection.execute("SET lock_timeout = '10ms'")
        unread = table_checks._some_row_has_text(table_checks.Look(connection, make_params(), {}, {}))
    assert (unread.verdict, unread.found, unread.do) == (
        "UNKNOWN",
        "could not be read: canceling statement due to lock timeout",
        "resolve what the server reports, then rerun the same command",
    )


def test_an_unreachable_server_does_not_hide_the_other_problems(
    make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DSN_ENV, "postgresql://u:hunter2@127.0.0.1:1/d")
    gates = inputs.input_problems(make_params(extension={"version": "0.9.9"}))
    assert _failed(gates) == ["db.server_is_reachable", "versions.wanted_release_is_usable"]
    assert "hunter2" not in str(gates)


def test_vectors_without_a_model_and_queries_without_vectors_are_found_first(
    articles: Connection, make_params: MakeParams
) -> None:
    articles.execute(
        "CREATE EXTENSION vector; CREATE TABLE made_elsewhere (id bigint PRIMARY KEY, embedding vector(8))"
    )
    articles.execute("INSERT INTO made_elsewhere VALUES (1, '[1,0,0,0,0,0,0,0]')")
    p = make_params(embeddings={"source": "table", "callable": None, "table": "public.made_elsewhere"})
    assert _failed(inputs.input_problems(p)) == ["embed.model_can_be_loaded"]


def test_a_model_that_cannot_be_loaded_is_said_once(articles: Connection, make_params: MakeParams) -> None:
    p = make_params(embeddings={"callable": "no_such_module:embed"})
    assert _failed(inputs.input_problems(p)) == ["embed.model_can_be_loaded"]


def test_problems_of_every_kind_are_named_at_once(articles: Connection, make_params: MakeParams) -> None:
    articles.execute("ALTER TABLE articles ADD COLUMN embedding real[]")
    p = make_params(
        target={"key": "views", "text_columns": ["titel", "views"], "filters": ["state"]},
        vector={"dimension": 9},
        search={"fulltext_column": "body", "fulltext_config": "englisch", "grant_to": ["nobody here"]},
        legacy={"query": "SELECT id FROM articels WHERE title = :query LIMIT :k"},
    )
    assert _failed(inputs.input_problems(p)) == [
        "inputs.key_identifies_rows",
        "inputs.text_column_exists",
        "inputs.text_column_exists",
        "inputs.filter_column_exists",
        "inputs.new_columns_are_free",
        "inputs.fulltext_column_is_tsvector",
        "inputs.fulltext_config_exists",
        "inputs.granted_roles_exist",
        "inputs.legacy_query_runs",
        "inputs.judged_keys_exist",
        "embed.model_dimension_fits",
    ]


def test_a_misspelt_table_gets_the_nearest_name(articles: Connection, make_params: MakeParams) -> None:
    assert str(_only(inputs.input_problems(make_params(target={"table": "artikles"})))) == (
        'FAIL    inputs.table_exists   "public"."artikles"\n'
        "  found   no such table\n"
        "  needed  a table that columns can be added to\n"
        "  danger  nothing was started; the run would fail half-way\n"
        '  do      did you mean "public"."articles"?'
    )


def test_a_table_of_another_schema_is_offered(articles: Connection, make_params: MakeParams) -> None:
    articles.execute('CREATE SCHEMA "My Shop"; ALTER TABLE articles SET SCHEMA "My Shop"')
    assert _only(inputs.input_problems(make_params())).do == 'did you mean "My Shop"."articles"?'


@pytest.mark.parametrize(
    ("make", "found"),
    [
        ("CREATE VIEW other AS SELECT * FROM articles", "a view"),
        ("CREATE MATERIALIZED VIEW other AS SELECT * FROM articles", "a materialized view"),
        (
            "CREATE EXTENSION postgres_fdw; CREATE SERVER s FOREIGN DATA WRAPPER postgres_fdw;"
            "CREATE FOREIGN TABLE other (id bigint) SERVER s",
            "a foreign table",
        ),
    ],
)
def test_what_is_no_table_is_refused(articles: Connection, make_params: MakeParams, make: str, found: str) -> None:
    articles.execute(make)
    g = _only(inputs.input_problems(make_params(target={"table": "other"})))
    assert (g.name, g.found, g.do) == ("inputs.table_exists", found, "name the table behind it")


def test_a_misspelt_column_gets_the_nearest_name(articles: Connection, make_params: MakeParams) -> None:
    assert str(_only(inputs.input_problems(make_params(target={"text_columns": ["titel"]})))) == (
        'FAIL    inputs.text_column_exists   titel of "public"."articles"\n'
        "  found   no such column\n"
        "  needed  a column of text\n"
        "  danger  nothing was started; the run would fail half-way\n"
        "  do      did you mean title?"
    )


@pytest.mark.parametrize(
    ("change", "found", "do"),
    [
        (
            "ALTER TABLE articles DROP CONSTRAINT articles_pkey",
            "no valid unique index on this column alone, NOT NULL",
            'CREATE UNIQUE INDEX CONCURRENTLY ON "public"."articles" ("id");',
        ),
        (
            "ALTER TABLE articles DROP CONSTRAINT articles_pkey; CREATE UNIQUE INDEX ON articles (id) WHERE id > 0",
            "no valid unique index on this column alone, NOT NULL",
            'CREATE UNIQUE INDEX CONCURRENTLY ON "public"."articles" ("id");',
        ),
        (
            "ALTER TABLE articles DROP CONSTRAINT articles_pkey; CREATE UNIQUE INDEX ON articles (id, title)",
            "no valid unique index on this column alone, NOT NULL",
            'CREATE UNIQUE INDEX CONCURRENTLY ON "public"."articles" ("id");',
        ),
        (
            "ALTER TABLE articles DROP CONSTRAINT articles_pkey, ALTER id DROP IDENTITY, ALTER id DROP NOT NULL,"
            " ADD CONSTRAINT articles_id UNIQUE (id)",
            "unique by articles_id, NULL allowed",
            'ALTER TABLE "public"."articles" ALTER COLUMN "id" SET NOT NULL;',
        ),
    ],
)
def test_a_key_that_does_not_identify_rows_is_refused_with_the_statement_that_mends_it(
    articles: Connection, make_params: MakeParams, change: str, found: str, do: str
) -> None:
    articles.execute(change)
    assert str(_only(inputs.input_problems(make_params()))) == (
        'FAIL    inputs.key_identifies_rows   id of "public"."articles"\n'
        f"  found   {found}\n"
        "  needed  NOT NULL, with its own primary key or unique index, without a condition\n"
        "  danger  a vector could reach two rows, or none\n"
        f"  do      {do}"
    )


@pytest.mark.parametrize(
    ("kind", "default"),
    [("uuid", "gen_random_uuid()"), ("text", "md5(random()::text)"), ("numeric", "random()")],
)
def test_keys_tables_and_schemas_that_need_quoting(
    database: str, make_params: MakeParams, kind: str, default: str
) -> None:
    query = 'SELECT "Key Col" FROM "My Shop"."Order ""x""" WHERE "Te %xt" ILIKE :query LIMIT :k'
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute('CREATE SCHEMA "My Shop"')
        admin.execute(
            'CREATE TABLE "My Shop"."Order ""x"""'
            f' ("Key Col" {kind} PRIMARY KEY DEFAULT {default}, "Te %xt" varchar(90))'
        )
        admin.execute("""INSERT INTO "My Shop"."Order ""x""\" ("Te %xt") VALUES ('words')""")
    p = make_params(
        target={"schema": "My Shop", "table": 'Order "x"', "key": "Key Col", "text_columns": ["Te %xt"]},
        search={"fulltext_column": None},
        legacy={"query": query},
        queries={"judgements": None},
    )
    gates = inputs.input_problems(p)
    if kind == "numeric":
        g = gates.failed[0]
        assert (g.name, g.found) == ("inputs.key_is_supported", "numeric")
    else:
        assert gates.passed, str(gates)


def test_columns_that_the_runbook_made_are_not_in_its_way(
    articles: Connection, open_phase: OpenPhase, make_params: MakeParams
) -> None:
    articles.execute("ALTER TABLE articles ADD COLUMN embedding real[]")
    phase = open_phase("30_expand_schema")
    assert str(_only(inputs.input_problems(make_params()))) == (
        'FAIL    inputs.new_columns_are_free   "public"."articles"\n'
        "  found   embedding there, not made by this runbook\n"
        "  needed  embedding, embedding_updated_at and embedding_hash free, or made by this runbook\n"
        "  danger  the backfill would overwrite, and undo would drop, what somebody else keeps there\n"
        "  do      name another column in vector.column"
    )
    phase.ledger.append("statement", {"name": "schema.add_columns"})
    assert inputs.input_problems(make_params()).passed
    phase.ledger.append("phase", {"verdict": "UNDONE"})
    assert _failed(inputs.input_problems(make_params())) == ["inputs.new_columns_are_free"]


def test_a_side_table_that_the_runbook_did_not_make_is_refused(
    articles: Connection, open_phase: OpenPhase, make_params: MakeParams
) -> None:
    articles.execute("CREATE TABLE articles_embedding (id bigint, note text)")
    beside = {"layout": "side_table"}
    phase = open_phase("30_expand_schema", vector=beside)
    assert str(_only(inputs.input_problems(make_params(vector=beside)))) == (
        'FAIL    inputs.side_table_is_free   "public"."articles_embedding"\n'
        "  found   a table, not made by this runbook\n"
        "  needed  no relation by that name, or the one that this runbook made\n"
        "  danger  the backfill would put vectors into it, and undo would drop what somebody else keeps"
        " there\n"
        "  do      name another column in vector.column: the side table is called articles_<column>; or set"
        " vector.layout: column"
    )
    assert inputs.input_problems(make_params()).passed, "in the column's layout the name is of no concern"
    articles.execute("DROP TABLE articles_embedding; CREATE VIEW articles_embedding AS SELECT 1 AS one")
    assert _only(inputs.input_problems(make_params(vector=beside))).found == "a view, not made by this runbook"
    articles.execute("DROP VIEW articles_embedding")
    extension.apply(phase)
    expand_schema.apply(phase)
    assert inputs.input_problems(make_params(vector=beside)).passed, "its own is not in its way"
    expand_schema.undo(phase)
    articles.execute("CREATE TABLE articles_embedding (id bigint)")
    assert _failed(inputs.input_problems(make_params(vector=beside))) == ["inputs.side_table_is_free"]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (
            "SELECT id FROM articels WHERE title = :query LIMIT :k",
            'PostgreSQL says: relation "articels" does not exist',
        ),
        ("SELECT title FROM articles WHERE title = :query LIMIT :k", "it returns title"),
        (
            "DELETE FROM articles WHERE title = :query AND id = :k RETURNING id",
            'PostgreSQL says: syntax error at or near "FROM"',
        ),
        (
            "SELECT id FROM articles WHERE title = :query LIMIT :k) x; DROP TABLE articles; --",
            'PostgreSQL says: syntax error at or near ")"',
        ),
    ],
)
def test_a_legacy_query_that_cannot_run_shows_postgresqls_words(
    articles: Connection, make_params: MakeParams, query: str, found: str
) -> None:
    assert str(_only(inputs.input_problems(make_params(legacy={"query": query})))) == (
        "FAIL    inputs.legacy_query_runs   legacy.query\n"
        f"  found   {found}\n"
        "  needed  a SELECT that returns a column named id\n"
        "  danger  there would be no search of today to compare with, nor to go back to\n"
        "  do      fix legacy.query; try it in psql with values in place of :query and :k"
    )
    assert articles.execute("SELECT count(*) > 0 FROM articles").fetchone() == (True,)


def test_a_legacy_query_may_hold_per_cent_signs_filters_and_no_trigger_of_execution(
    articles: Connection, make_params: MakeParams
) -> None:
    query = (
        "SELECT id, pg_sleep(60) FROM articles WHERE title LIKE '%a%' AND body % :query"
        " AND (:status IS NULL OR status = :status) ORDER BY similarity(body, :query) LIMIT :k"
    )
    started = time.perf_counter()
    assert inputs.input_problems(make_params(target={"filters": ["status"]}, legacy={"query": query})).passed
    assert time.perf_counter() - started < 30


def test_where_nothing_tells_the_type_of_the_words_the_remedy_is_to_write_it(
    articles: Connection, make_params: MakeParams
) -> None:
    query = "SELECT id FROM articles WHERE title ILIKE concat('%', :query, '%') LIMIT :k"
    refused = _only(inputs.input_problems(make_params(legacy={"query": query})))
    assert refused.do == "name its type in legacy.query, as in :query::text"
    assert inputs.input_problems(make_params(legacy={"query": query.replace(":query", ":query::text")})).passed


@pytest.mark.parametrize(("there", "gone", "holds"), [(95, 5, True), (94, 6, False)])
def test_judged_keys_that_are_not_in_the_table_are_named(
    articles: Connection, make_params: MakeParams, tmp_path: Path, there: int, gone: int, holds: bool
) -> None:
    p = make_params()
    keys = [*range(1, there + 1), *range(99_999, 99_999 + gone)]
    lines = [json.dumps({"query_id": "q00", "key": str(key), "relevance": 1}) + "\n" for key in keys]
    (tmp_path / "judgements.jsonl").write_text("".join(lines))
    (g,) = [g for g in inputs.input_problems(p) if g.name == "inputs.judged_keys_exist"]
    assert (g.verdict == "PASS", g.found.startswith("not in the table: 99999, 100000, ")) == (holds, True)
    assert g.needed == 'every judged key a id of "public"."articles", but for 5% that may have been deleted since'


def test_a_missing_query_file_is_named(articles: Connection, make_params: MakeParams, tmp_path: Path) -> None:
    p = make_params()
    (tmp_path / "queries.jsonl").unlink()
    assert "queries.jsonl" in str(inputs.input_problems(p).failed[0])


def test_a_release_that_the_server_does_not_have_is_refused(articles: Connection, make_params: MakeParams) -> None:
    g = _only(inputs.input_problems(make_params(extension={"version": "0.8.3"})))
    assert (g.name, g.found, g.needed) == ("inputs.pgvector_is_available", "the server offers 0.8.6", "0.8.3")


def test_a_role_without_rights_is_told_each_grant(articles: Connection, make_params: MakeParams, role: str) -> None:
    p = make_params(legacy={"query": "SELECT 1 AS id WHERE :query <> '' LIMIT :k"}, queries={"judgements": None})
    gates = {g.name: g for g in inputs.input_problems(p).failed}
    database = articles.info.dbname
    assert {name: g.do.removeprefix("have the owner or a superuser run: ") for name, g in gates.items()} == {
        "inputs.may_make_extension": "have a superuser run in this database: CREATE EXTENSION vector;",
        "inputs.owns_table": 'GRANT postgres TO "Odd role";',
        "inputs.may_create_in_schema": 'GRANT CREATE ON SCHEMA "public" TO "Odd role";',
        "inputs.may_make_ledger": f'GRANT CREATE ON DATABASE {database} TO "Odd role";',
    }
    assert str(gates["inputs.owns_table"]) == (
        'FAIL    inputs.owns_table   "public"."articles"\n'
        '  found   owned by postgres, and "Odd role" is not a member of it\n'
        "  needed  the table's owner, as ALTER TABLE and CREATE INDEX want it\n"
        "  danger  PostgreSQL would refuse a statement half-way through the migration\n"
        '  do      have the owner or a superuser run: GRANT postgres TO "Odd role";'
    )


def test_an_ordinary_owner_with_the_grants_named_passes(
    articles: Connection, make_params: MakeParams, role: str
) -> None:
    articles.execute("CREATE EXTENSION vector")
    articles.execute(sql.SQL("ALTER TABLE articles OWNER TO {}").format(sql.Identifier(role)))
    articles.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(role)))
    grant = sql.SQL("GRANT CREATE ON DATABASE {} TO {}")
    articles.execute(grant.format(sql.Identifier(articles.info.dbname), sql.Identifier(role)))
    gates = inputs.input_problems(make_params())
    assert gates.passed, str(gates)


def test_a_ledger_of_somebody_else_is_told_with_its_grants(
    articles: Connection, open_phase: OpenPhase, make_params: MakeParams, role: str, database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(DSN_ENV, database)
    open_phase()
    monkeypatch.setenv(DSN_ENV, make_conninfo(database, user=role))
    gates = {g.name: g for g in inputs.input_problems(make_params()).failed}
    assert gates["inputs.may_make_ledger"].do.endswith('GRANT USAGE, CREATE ON SCHEMA runbook TO "Odd role";')
    articles.execute(sql.SQL("GRANT USAGE, CREATE ON SCHEMA runbook TO {}").format(sql.Identifier(role)))
    gates = {g.name: g for g in inputs.input_problems(make_params()).failed}
    assert gates["ledger.takes_rows_from_this_role"].do.endswith('GRANT postgres TO "Odd role";')


def test_a_server_that_takes_no_writes_is_refused(
    articles: Connection, make_params: MakeParams, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DSN_ENV, make_conninfo(database, options="-c default_transaction_read_only=on"))
    g = _only(inputs.input_problems(make_params()))
    assert (g.name, g.found) == ("inputs.server_takes_writes", "read only by default")


def test_a_quiet_database_passes_every_risk(open_phase: OpenPhase) -> None:
    gates = preflight.look(open_phase())
    assert gates.passed, str(gates)
    assert [g.name for g in gates if g.name.startswith("preflight.")] == [
        "preflight.no_old_snapshot",
        "preflight.no_prepared_transactions",
        "preflight.memory_fits_index",
        "preflight.shared_memory_holds_build",
        "preflight.disk_holds_it",
        "preflight.wal_slots_healthy",
    ]


def test_an_old_transaction_is_named_with_its_pid(
    open_phase: OpenPhase, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "OLD_SNAPSHOT_S", 0)
    phase = open_phase()
    with psycopg.connect(database, application_name="nightly report") as other:
        other.execute("SELECT 1")
        g = _only(preflight.look(phase))
        assert g.found.startswith(
            f"pid {other.info.backend_pid} (postgres, nightly report, idle in transaction) for "
        )
    assert (g.name, g.verdict, g.needed, g.danger, g.do) == (
        "preflight.no_old_snapshot",
        "FAIL",
        "no transaction of this database open for 0 s or longer",
        "CREATE INDEX CONCURRENTLY waits for each of them, and dead rows of the backfill cannot be cleaned",
        "wait for them, or end them: SELECT pg_terminate_backend(<pid>);",
    )


def test_sessions_that_cannot_be_looked_into_are_unknown_not_passed(
    articles: Connection, open_phase: OpenPhase, role: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DSN_ENV, database)
    phase = open_phase()
    monkeypatch.setenv(DSN_ENV, make_conninfo(database, user=role))
    phase.connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
    g = preflight._no_old_snapshot(phase.connection, phase.params)
    assert (g.verdict, g.do) == ("UNKNOWN", 'have a superuser run: GRANT pg_read_all_stats TO "Odd role";')
    assert g.found.endswith('sessions that "Odd role" may not look into')
    articles.execute(sql.SQL("GRANT pg_read_all_stats TO {}").format(sql.Identifier(role)))
    assert preflight._no_old_snapshot(phase.connection, phase.params).verdict == "PASS"


def test_memory_that_does_not_hold_the_index_says_how_much_would(articles: Connection, open_phase: OpenPhase) -> None:
    articles.execute("UPDATE pg_class SET reltuples = 200000 WHERE relname = 'articles'")
    phase = open_phase(index={"maintenance_work_mem_mb": 64})
    assert str(_only(preflight.look(phase))) == (
        'FAIL    preflight.memory_fits_index   hnsw on "public"."articles"\n'
        "  found   200,000 rows want 136 MB while the index is built\n"
        "  needed  at most 60 MB, of index.maintenance_work_mem_mb: 64\n"
        "  danger  pgvector writes the unfinished graph to disk and continues ten times as slowly\n"
        "  do      set index.maintenance_work_mem_mb: 141, if the server has that to spare;"
        " or index.storage: halfvec (133 MB while it is built, 61 MB after);"
        " or index.method: ivfflat (200 lists, 14 probes to start with, 8.3 MB while it is built, 11 MB after)"
    )
    again = open_phase(index={"maintenance_work_mem_mb": 141})
    assert preflight.look(again).passed


def test_a_slot_that_nobody_reads_is_refused(articles: Connection, open_phase: OpenPhase) -> None:
    phase = open_phase()
    articles.execute("SELECT pg_create_physical_replication_slot('left_behind', true)")
    try:
        g = _only(preflight.look(phase))
        facts = preflight.facts(phase)
    finally:
        articles.execute("SELECT pg_drop_replication_slot('left_behind')")
    assert (g.name, g.needed) == ("preflight.wal_slots_healthy", "every slot active")
    assert g.found.startswith("left_behind (inactive, keeps ")
    assert facts.slots[0].startswith("left_behind (inactive")


def test_the_facts_are_the_tables_own(articles: Connection, open_phase: OpenPhase) -> None:
    articles.execute("ALTER TABLE articles SET (fillfactor = 80)")
    found = preflight.facts(open_phase())
    assert (found.rows, found.rows_are_counted, found.sampled_rows, found.fillfactor) == (201, False, 201, 80)
    assert [name for name, *_ in found.indexes] == ["articles_pkey", "articles_trgm", "articles_tsv"]
    exact = articles.execute(
        "SELECT pg_relation_size('articles'), pg_indexes_size('articles'),"
        " sum(octet_length(concat_ws(E'\\n', title, body))) FROM articles"
    ).fetchone()
    assert exact == (found.heap_bytes, found.indexes_bytes, found.text_bytes)
    assert found.settings["wal_level"] == "replica"
    assert "pg_stat_statements is not installed" in str(found) and "201, estimated" in found._repr_html_()


def test_a_table_that_was_never_analyzed_is_counted(articles: Connection, open_phase: OpenPhase) -> None:
    articles.execute("CREATE TABLE fresh (LIKE articles INCLUDING ALL)")
    articles.execute("INSERT INTO fresh (title) SELECT 't' FROM generate_series(1, 7)")
    found = preflight.facts(open_phase(target={"table": "fresh"}))
    assert (found.rows, found.rows_are_counted) == (7, True)


def test_a_partitioned_tables_facts_are_summed(articles: Connection, open_phase: OpenPhase) -> None:
    articles.execute(
        """
        CREATE TABLE parted (id bigint PRIMARY KEY, title text, body text) PARTITION BY RANGE (id);
        CREATE TABLE parted_a PARTITION OF parted FOR VALUES FROM (0) TO (100);
        CREATE TABLE parted_b PARTITION OF parted FOR VALUES FROM (100) TO (200);
        INSERT INTO parted SELECT i, 'x', 'y' FROM generate_series(0, 199) i; ANALYZE parted;
        """
    )
    found = preflight.facts(open_phase(target={"table": "parted"}))
    assert (found.partitions, found.rows, found.sampled_rows, found.heap_bytes) == (2, 200, 200, 2 * 8192)


def test_a_large_table_is_sampled_by_pages(articles: Connection, open_phase: OpenPhase) -> None:
    articles.execute(
        "INSERT INTO articles (title, body) SELECT 't', repeat('word ', 20) FROM generate_series(1, 30000);"
        "ANALYZE articles"
    )
    found = preflight.facts(open_phase())
    assert 500 < found.sampled_rows <= preflight.SAMPLED_ROWS
    assert found.text_bytes == pytest.approx(30_000 * 102, rel=0.1)


def test_sensitive_data_is_counted_and_never_shown(articles: Connection, open_phase: OpenPhase) -> None:
    articles.execute("UPDATE articles SET body = 'write to ann.secret@example.org' WHERE id <= 3")
    articles.execute("UPDATE articles SET body = 'paid with 4111 1111 1111 1111' WHERE id = 4")
    found = preflight.facts(open_phase())
    assert found.sensitive_rows == {
        "e-mail addresses": 3,
        "payment card numbers": 1,
        "IBANs": 0,
        "IP addresses": 0,
        "long tokens": 0,
        "telephone numbers": 0,
    }
    assert "e-mail addresses in 3, payment card numbers in 1, of 201 rows sampled" in str(found)
    assert "ann.secret" not in str(found) and "4111" not in found._repr_html_()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mail bob@example.com today", "e-mail addresses"),
        ("card 5500-0000-0000-0004", "payment card numbers"),
        ("DE89 3704 0044 0532 0130 00", "IBANs"),
        ("GB82WEST12345698765432", "IBANs"),
        ("from 192.168.10.20 at", "IP addresses"),
        ("key sk_live_4eC39HqLyjWDarjtT1zdp7dcABCD", "long tokens"),
    ],
)
def test_known_shapes_are_counted(text: str, kind: str) -> None:
    assert {k for k, n in masking.count([text]).items() if n} == {kind}


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",
        "DE88370400440532013000",
        "version 1.2.3",
        "1.2.3.4.5",
        "999.1.1.1",
        "0000 0000 0000 0000",
        "an ordinary sentence, with CWE-79 and 12345678",
        "a_very_long_identifier_without_any_digit_in_it",
    ],
)
def test_near_misses_are_not_counted(text: str) -> None:
    assert sum(masking.count([text]).values()) == 0


def test_searches_of_today_are_found_in_pg_stat_statements(articles: Connection, open_phase: OpenPhase) -> None:
    articles.execute('CREATE SCHEMA "Stats"; CREATE EXTENSION pg_stat_statements SCHEMA "Stats"')
    for _ in range(3):
        articles.execute("SELECT id FROM articles WHERE title ILIKE '%secret word%'")
    articles.execute("SELECT id FROM articles WHERE tsv @@ to_tsquery('cookie')")
    articles.execute("SELECT id FROM articles WHERE id = 1")
    found = preflight.facts(open_phase()).legacy_statements
    assert found is not None
    assert [(calls, text) for calls, _, text in found] == [
        (3, "SELECT id FROM articles WHERE title ILIKE $1"),
        (1, "SELECT id FROM articles WHERE tsv @@ to_tsquery($1)"),
    ]


def test_facts_that_a_role_may_not_see_say_why(
    articles: Connection, open_phase: OpenPhase, role: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DSN_ENV, database)
    phase = open_phase()
    phase.connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
    found = preflight.facts(phase)
    assert (found.text_bytes, found.sensitive_rows) == (None, None)
    assert found.not_seen["sample"] == "permission denied for table articles"
    assert "not seen: permission denied for table articles" in str(found)
    assert found.not_seen["sessions"].endswith("GRANT pg_read_all_stats to it")


def test_facts_of_a_table_that_is_not_there_are_refused(open_phase: OpenPhase) -> None:
    with pytest.raises(BadInput, match="no such table"):
        preflight.facts(open_phase(target={"table": "nothing"}))


def test_the_plan_is_written_once_the_run_carries_things_out(articles: Connection, open_phase: OpenPhase) -> None:
    phase = open_phase()
    shown = preflight.take(phase)
    plan = phase.ledger.latest("plan", "00_preflight")
    assert plan is not None
    assert (plan["fingerprint"], plan["table_rows"]) == (phase.params.fingerprint(), 201)
    assert plan["forecast"]["index_bytes"] == shown.index_bytes > 0
    assert (plan["pgvector_available"], plan["pgvector_installed"]) == ("0.8.6", None)
    assert plan["params"] == phase.params.for_record()


def test_without_execute_no_ledger_is_made(articles: Connection, open_phase: OpenPhase) -> None:
    phase = open_phase(execute=False)
    articles.execute("DROP SCHEMA runbook CASCADE")
    assert preflight.take(phase).rows == 201
    assert not phase.ledger.exists()


def test_facts_and_plan_of_a_table_whose_names_need_quoting(articles: Connection, open_phase: OpenPhase) -> None:
    articles.execute('CREATE SCHEMA "My Shop %s"')
    articles.execute(
        'CREATE TABLE "My Shop %s"."Order ""x""" ("Key" uuid PRIMARY KEY DEFAULT gen_random_uuid(), "Te %xt" text)'
    )
    articles.execute('INSERT INTO "My Shop %s"."Order ""x""" ("Te %xt")' + " SELECT 'é' FROM generate_series(1, 5)")
    phase = open_phase(
        target={"schema": "My Shop %s", "table": 'Order "x"', "key": "Key", "text_columns": ["Te %xt"]}
    )
    found = preflight.facts(phase)
    assert (found.rows, found.text_bytes, [m for _, m, *_ in found.indexes]) == (5, 10, ["btree"])
    assert preflight.take(phase).rows == 5
