"""Sessions have the runbook's settings whatever the database and the role say, and no message holds a password."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from runbook_lib.backfill import change_queue
from runbook_lib.core import conninfo_masking, db, session
from runbook_lib.core.gates import Gate, RunbookError
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import (
    application_settings,
    backfill,
    baseline,
    build_index,
    cut_over,
    expand_schema,
    extension,
    inputs,
    load_embeddings,
    shadow,
    tune,
)
from runbook_lib.operate import reads_to_legacy
from runbook_lib.params import Params
from runbook_lib.search import search_function
from tests import toy

HOSTILE = {
    "statement_timeout": "50ms",
    "idle_session_timeout": "200ms",
    "idle_in_transaction_session_timeout": "20ms",
    "transaction_timeout": "100ms",
    "lock_timeout": "1ms",
    "client_encoding": "LATIN1",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kathmandu",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "quote_all_identifiers": "on",
    "standard_conforming_strings": "off",
    "backslash_quote": "off",
    "transform_null_equals": "on",
    "array_nulls": "off",
    "search_path": "",
    "default_transaction_read_only": "on",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "session_replication_role": "replica",
    "check_function_bodies": "off",
    "client_min_messages": "error",
    "enable_indexscan": "off",
    "debug_parallel_query": "on",
    "row_security": "off",
    # What new tables would get, and what a trigger of the server's would no longer do.
    "default_table_access_method": "heap_of_others",
    "event_triggers": "off",
    "default_statistics_target": "1",
    # How statements are planned, and with how much memory; what an absurd plan answers is right all the same.
    "work_mem": "64kB",
    "maintenance_work_mem": "1MB",
    "max_stack_depth": "100kB",
    "gin_fuzzy_search_limit": "1",
    "plan_cache_mode": "force_generic_plan",
    "seq_page_cost": "100",
    "random_page_cost": "1000",
    "enable_sort": "off",
    "enable_nestloop": "off",
    "enable_hashjoin": "off",
    "from_collapse_limit": "1",
    "stats_fetch_consistency": "snapshot",
    # Of pgvector: known to the server only where its library is loaded.
    "hnsw.ef_search": "1",
    "hnsw.max_scan_tuples": "1",
    # And the rest.
    "xmloption": "document",
    "xmlbinary": "hex",
    "escape_string_warning": "off",
    "default_text_search_config": "pg_catalog.simple",
    "restrict_nonsystem_relation_kind": "view",
    "track_counts": "off",
    "track_activities": "off",
    "exit_on_error": "on",
}


@pytest.mark.parametrize("whose", ["DATABASE", "ROLE"])
def test_a_whole_migration_under_hostile_settings(
    open_phase: Callable[..., Phase], articles: psycopg.Connection[Any], whose: str
) -> None:
    whom = articles.info.dbname if whose == "DATABASE" else articles.info.user
    articles.execute("CREATE ACCESS METHOD heap_of_others TYPE TABLE HANDLER heap_tableam_handler")
    for name, value in HOSTILE.items():
        articles.execute(
            sql.SQL("ALTER {} {} SET {} = {}").format(
                sql.SQL(whose), sql.Identifier(whom), sql.SQL(name), sql.Literal(value)
            )
        )
    try:
        # The application's own query must name its table as the application's path needs it.
        query = toy.params("")["legacy"]["query"].replace("FROM articles", "FROM public.articles")
        phase = open_phase(
            "90_cut_over", legacy={"query": query}, cut_over={"share_steps_percent": [100], "calls_per_step": 20}
        )
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index, tune):
            module.apply(phase)
        baseline.apply(phase)
        shadow.apply(phase)
        cut_over.apply(phase)
        for module in (expand_schema, backfill, cut_over):
            gates = module.verify(phase)
            # Without 00_preflight there is no catalogue of the start to compare with.
            assert [g.name for g in gates.failed if "catalogue from the start" not in g.found] == []
        articles.execute("UPDATE articles SET title = 'Größe und Maß' WHERE id = 3")
        assert change_queue.drain(phase).updated == 1
        assert backfill.verify(phase).passed
        refused = "SELECT count(embedding) FROM articles"
        assert articles.execute(refused).fetchone() == (toy.ROWS,)
        others = "SELECT relname FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE a.amname = 'heap_of_others'"
        assert articles.execute(others).fetchall() == []
        reads_to_legacy.undo(phase)
        for back in (build_index, expand_schema, search_function):
            back.undo(phase)
        there = (
            "SELECT count(*) FROM pg_attribute WHERE attrelid = 'articles'::regclass AND attname LIKE 'embedding%'"
        )
        assert articles.execute(there).fetchone() == (0,)
    finally:
        if whose == "ROLE":
            articles.execute(sql.SQL("ALTER ROLE {} RESET ALL").format(sql.Identifier(whom)))


def test_a_session_is_out_of_a_timeouts_reach_before_it_asks_anything_that_takes_time(
    articles: psycopg.Connection[Any], make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    whom = sql.Identifier(articles.info.dbname)
    articles.execute(sql.SQL("ALTER DATABASE {} SET statement_timeout = '1s'").format(whom))
    block = session.SQL["take_path"]
    slow = replace(block, text=block.text.replace("SELECT ", "SELECT pg_catalog.pg_sleep(1.5), ", 1))
    monkeypatch.setattr(session, "SQL", {**session.SQL, "take_path": slow})
    began = time.monotonic()
    db.connect(make_params(), "test").close()
    assert time.monotonic() - began > 1.5


def test_every_setting_is_set_by_one_place_and_a_session_shows_it(
    open_phase: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    articles.execute(
        sql.SQL("ALTER DATABASE {} SET bytea_output = 'escape'").format(sql.Identifier(articles.info.dbname))
    )
    phase = open_phase()
    # Those of TCP are 0 on a socket.
    names = [name for name in session.SETTINGS if not name.startswith(("default_transaction_read_only", "tcp_"))]
    found = phase.connection.execute(
        "SELECT lower(name) AS name, setting, unit FROM pg_settings WHERE lower(name) = ANY (%s)",
        [[n.lower() for n in names]],
    ).fetchall()
    wrong = {
        row["name"]: row["setting"]
        for row in found
        if row["unit"] is None and row["setting"] != {n.lower(): v for n, v in session.SETTINGS.items()}[row["name"]]
    }
    assert wrong == {} and len(found) > 20


@pytest.mark.attack
@pytest.mark.parametrize(
    "conninfo",
    [
        "postgresql://me:p@ss-word!@nowhere.invalid/db",
        "postgresql://me:s3cret#frag@nowhere.invalid/db",
        "postgresql://me:s3cret/with/slash@nowhere.invalid:54x/db",
        "postgresql://me:s3cret%zz@nowhere.invalid/db",
        "postgresql://me@nowhere.invalid/db?password=s3cret&sslmode=nonsense",
        "host=nowhere.invalid password=two words user=me",
        "host=nowhere.invalid password='it\\'s s3cret' user=me",
        "postgresql://me:s3cret@a.invalid:1,b.invalid:2/db",
        "postgresql://me@nowhere.invalid/db?password=s3cret&two words&sslmode=bad",
        "postgresql:/me:s3cret@nowhere.invalid/db",
        "me:s3cret@nowhere.invalid/db",
        "postgresql//me:s3cret@nowhere.invalid",
    ],
)
def test_no_part_of_a_password_is_in_an_error(conninfo: str) -> None:
    with pytest.raises(psycopg.Error) as raised:
        psycopg.connect(conninfo, connect_timeout=2)
    shown = conninfo_masking.masked(str(raised.value), conninfo)
    for part in ("p@ss", "ss-word", "word!", "s3cret", "cret", "frag", "slash", "two words", "words"):
        assert part not in shown or part not in conninfo


@pytest.mark.parametrize("how", ["may create there", "owns a function there"])
def test_pgvector_is_found_in_a_schema_that_others_may_create_in(
    open_phase: Callable[..., Phase], articles: psycopg.Connection[Any], how: str
) -> None:
    """As schema public is up to PostgreSQL 14."""
    role = sql.Identifier(f"app_{articles.info.dbname}")
    articles.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    try:
        if how == "may create there":
            articles.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(role))
        else:
            articles.execute("CREATE FUNCTION public.slug(t text) RETURNS text LANGUAGE sql AS 'SELECT lower(t)'")
            articles.execute(sql.SQL("ALTER FUNCTION public.slug(text) OWNER TO {}").format(role))
        phase = open_phase("60_build_index")
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        assert backfill.verify(phase).passed
    finally:
        articles.execute(sql.SQL("DROP OWNED BY {r}; DROP ROLE {r}").format(r=role))


def test_who_may_not_use_the_schema_of_pgvector_is_told_which_grant_is_missing(
    articles: psycopg.Connection[Any], database: str
) -> None:
    role = f"poor_{articles.info.dbname}"
    articles.execute(f"CREATE ROLE {role} LOGIN")
    try:
        own = make_conninfo(database, user=role)
        with psycopg.connect(own, autocommit=True, row_factory=dict_row) as connection:
            session.begin(connection, "public", "articles", lock_timeout_ms=1000)
            with pytest.raises(RunbookError) as error:
                session.register_vector(connection)
            assert error.value.found == f"database {articles.info.dbname} has no pgvector"
            articles.execute('CREATE SCHEMA "of others"; CREATE EXTENSION vector SCHEMA "of others"')
            with pytest.raises(RunbookError) as error:
                session.register_vector(connection)
            grant = f'GRANT USAGE ON SCHEMA "of others" TO {role};'
            assert str(error.value) == (
                f"\n  found   {role} lacks USAGE on schema of others, which pgvector is installed in\n"
                "  needed  USAGE, for its types and operators\n"
                "  danger  no vector can be sent or read; nothing was changed\n"
                f"  do      have its owner or a superuser run: {grant}"
            )
            articles.execute(grant)
            session.register_vector(connection)
    finally:
        articles.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_setting_that_keeps_the_application_from_the_index_is_found_by_check(
    articles: psycopg.Connection[Any], make_params: Callable[..., Any]
) -> None:
    whom = sql.Identifier(articles.info.dbname)
    articles.execute(sql.SQL("ALTER DATABASE {} SET enable_indexscan = off").format(whom))
    (found,) = inputs.input_problems(make_params()).failed
    database = articles.info.dbname
    assert str(found) == (
        "FAIL    inputs.application_uses_the_index   settings of the database and of the application's roles\n"
        f"  found   ALTER DATABASE {database} SET enable_indexscan = off\n"
        "  needed  enable_indexscan = on\n"
        "  danger  every search of the application would read the whole table, which no figure measured here shows\n"
        f"  do      let their owner run: ALTER DATABASE {database} RESET enable_indexscan"
    )


def test_settings_that_the_applications_own_query_would_have_are_found(
    articles: psycopg.Connection[Any], open_phase: Callable[..., Phase]
) -> None:
    database, reader = articles.info.dbname, f"reader_{articles.info.dbname}"
    own = {
        "mode": "application",
        "application_query": "SELECT id FROM articles ORDER BY embedding <=> :embedding LIMIT :k",
    }

    def told(**search_parameters: Any) -> Gate:
        p = open_phase(search=own | search_parameters).params
        with db.connect(p, "look") as connection:
            return list(application_settings.check(connection, p))[-1]

    articles.execute(
        sql.SQL("CREATE ROLE {r} LOGIN; GRANT SELECT ON articles TO {r}").format(r=sql.Identifier(reader))
    )
    try:
        assert told().found == "none of pgvector's, and no switch of the planner"
        for owner, setting in (
            (f"DATABASE {database}", "hnsw.ef_search = 10"),
            (f"ROLE {reader}", "enable_seqscan = no"),
        ):
            articles.execute(f"ALTER {owner} SET {setting}")
        before = told()
        assert (before.verdict, before.found, before.needed) == (
            "PASS",
            f"ALTER ROLE {reader} SET enable_seqscan = no; ALTER DATABASE {database} SET hnsw.ef_search = 10",
            "to be known: 70_tune will say with which settings it measured",
        )
        phase = open_phase("70_tune")
        search_function.apply(phase)
        extension.apply(phase)
        for statement in search_function.set_search_setting(phase.connection, phase.params, 80):
            articles.execute(statement.query, statement.values)
        assert str(told()) == (
            "FAIL    inputs.application_searches_as_measured   settings of the database and of the application's"
            " roles\n"
            f"  found   ALTER ROLE {reader} SET enable_seqscan = no;"
            f" ALTER DATABASE {database} SET hnsw.ef_search = 10\n"
            "  needed  hnsw.ef_search = 80; hnsw.iterative_scan = strict_order; hnsw.max_scan_tuples = 20000;"
            " enable_seqscan = on\n"
            "  danger  the application's own query has these settings, and with them another recall and another time"
            " than those that were measured\n"
            f"  do      let their owner run: ALTER ROLE {reader} SET enable_seqscan = on;"
            f" ALTER DATABASE {database} SET hnsw.ef_search = 80"
        )
        articles.execute(f"ALTER ROLE {reader} SET enable_seqscan = 'yes'; ALTER ROLE {reader} SET enable_sort = 1")
        after = told()
        assert (after.verdict, after.found) == ("FAIL", f"ALTER DATABASE {database} SET hnsw.ef_search = 10")
        articles.execute(f"ALTER ROLE {reader} IN DATABASE {database} SET hnsw.ef_search = 80")
        assert told(grant_to=[reader]).verdict == "PASS", "a role's own setting is stronger than the database's"
        assert told().verdict == "FAIL", "for another role the database's still holds"
    finally:
        articles.execute(f"DROP OWNED BY {reader}; DROP ROLE {reader}")
