"""Who may create in a schema of the path makes nothing of theirs run: the kind of CVE-2018-1058."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql

from runbook_lib.backfill import change_queue
from runbook_lib.core import session
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import (
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
from runbook_lib.operate import monitor, rebuild_index
from runbook_lib.search import conditions, live_shadow, search_function
from tests import attackers, toy
from tests.test_search_function import FILTERED, call

Open = Callable[..., Phase]
# Of the functions that no extension brought, and not the attacker: those of the runbook's.
PATHS = """
    SELECT p.pronamespace::regnamespace || '.' || p.proname, coalesce(array_to_string(p.proconfig, '; '), '')
    FROM pg_proc p
    WHERE p.proowner = current_user::regrole AND p.oid >= 16384
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                      AND d.deptype = 'e')
"""
INSTALLED = {
    "public.search_articles",
    "public.search_articles_shadow",
    "runbook.articles_capture",
    "runbook.chain_entry",
    "runbook.sign_off",
    "runbook.way_to_search",
    "runbook.check_vector",
    "runbook.articles_by_legacy",
    "runbook.articles_by_vector",
    "runbook.articles_by_vector_exact",
    "runbook.articles_by_hybrid",
    "runbook.articles_weigh_words",
    "runbook.articles_vector_weight",
}
CLOSED_PATH = "search_path=pg_catalog, pg_temp"
VECTOR = [float(x) for x in toy.embed(["cookie leaks"])[0]]


@pytest.mark.attack
def test_a_whole_migration_calls_nothing_that_others_have_planted(
    open_phase: Open, articles: psycopg.Connection[Any], database: str
) -> None:
    """In the schema of the table and of pgvector, which is on everybody's path but on that of no function of ours."""
    articles.execute("CREATE EXTENSION vector")
    with attackers.attacker(articles) as mallory, attackers.application(articles) as app:
        assert attackers.plant(articles, mallory) > 2000
        sections = {
            "target": {"filters": ["status"]},
            "search": {"fulltext_column": "tsv", "grant_to": [app]},
            "queries": {"sample": 10},
            "shadow": {"sample_percent": 100},
            "cut_over": {"share_steps_percent": [100], "calls_per_step": 10},
            "accept": {"open_schemas": ["public"]},
        }
        phase = open_phase("90_cut_over", **sections)
        assert inputs.check(phase.connection, phase.params).passed
        for module in (
            search_function,
            extension,
            expand_schema,
            load_embeddings,
            backfill,
            build_index,
            tune,
            live_shadow,
        ):
            module.apply(phase)
        baseline.apply(phase)
        shadow.apply(phase)
        cut_over.apply(phase)
        for module in (expand_schema, load_embeddings, backfill, build_index, tune):
            assert [g.name for g in module.verify(phase).failed if "catalogue from the start" not in g.found] == []
        for route in ("legacy", "hybrid", "vector"):
            search_function.move_route(phase, route, 100, "test")
            attackers.use(database, app, VECTOR)
        assert change_queue.drain(phase).updated == 1
        assert monitor.look(phase).passed
        again = open_phase("operate/rebuild_index", index={"m": 24}, **sections)
        rebuild_index.apply(again)
        for done in (phase, again):
            done.end("was ended by the test", "nothing")
        paths = dict(articles.execute(PATHS).fetchall())
        assert set(paths) >= INSTALLED
        # The legacy query's names, and nothing else of this function, are found where the application finds them.
        assert "search_path=public, pg_temp" in paths.pop("runbook.articles_by_legacy")
        assert {name: path for name, path in paths.items() if CLOSED_PATH not in path.split("; ")} == {}
        assert attackers.called(articles, mallory) == []
        attackers.call_inexactly(database)
        assert attackers.called(articles, mallory) == ["hashtextextended(text, integer)"], "the trap works"


@pytest.mark.attack
def test_no_schema_that_others_may_create_in_is_on_the_path(
    open_phase: Open, articles: psycopg.Connection[Any]
) -> None:
    articles.execute("CREATE SCHEMA vectors; CREATE EXTENSION vector SCHEMA vectors; CREATE SCHEMA postgres")
    assert session_path(open_phase()) == "pg_catalog, postgres, public, vectors, pg_temp"
    with attackers.attacker(articles) as mallory:
        grant = sql.SQL("GRANT CREATE ON SCHEMA vectors, postgres TO {}").format(sql.Identifier(mallory))
        articles.execute(grant)
        phase = open_phase(extension={"schema": "vectors"})
        assert session_path(phase) == "pg_catalog, pg_temp"
        with session.users_path(phase.connection):
            assert session_path(phase) == '"$user", public'
        found = inputs.check(phase.connection, phase.params).failed
        assert [g.name for g in found] == ["inputs.only_the_trusted_create_on_the_path"]
        assert str(found[0]) == (
            "FAIL    inputs.only_the_trusted_create_on_the_path   schemas on legacy.query's search path\n"
            f"  found   {mallory} may create in postgres; {mallory} may create in public\n"
            "  needed  CREATE only for superusers, this role, and the owners of the database and the table\n"
            "  danger  what is made in postgres, public and fits a call of legacy.query better than PostgreSQL's"
            " function or operator runs as postgres, and in the search function as its caller\n"
            f"  do      REVOKE CREATE ON SCHEMA postgres FROM {mallory};"
            f" REVOKE CREATE ON SCHEMA public FROM {mallory}; or accept it: accept.open_schemas: [postgres, public]"
        )
        agreed = open_phase(extension={"schema": "vectors"}, accept={"open_schemas": ["postgres"]})
        (gate,) = inputs.check(agreed.connection, agreed.params).failed
        assert gate.found == f"{mallory} may create in public"
        assert gate.danger.startswith("what is made in public and fits a call")
        assert gate.do.endswith("or accept it: accept.open_schemas: [postgres, public]"), "the whole list"


@pytest.mark.attack
def test_a_filter_of_citext_in_an_open_schema_is_compared_by_the_operator_of_its_type(
    open_phase: Open, articles: psycopg.Connection[Any]
) -> None:
    articles.execute(
        "CREATE EXTENSION citext; CREATE DOMAIN state AS citext; CREATE DOMAIN shown AS state;"
        " ALTER TABLE articles ALTER status TYPE shown USING status::citext, ALTER status SET DEFAULT 'Stable'"
    )
    with attackers.attacker(articles) as mallory:
        articles.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(mallory)))
        phase = open_phase("70_tune", **FILTERED)
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        state = search_function.function_state(phase.connection, phase.params)
        assert state is not None and state["settings"] == [CLOSED_PATH]
        for route in ("vector", "hybrid"):
            search_function.move_route(phase, route, 100, "test")  # type: ignore[arg-type]
            answers = [call(articles, "cookie leaks", status=given) for given in ("Stable", "STABLE", "Draft")]
            assert len(answers[0]) == 10 and answers[0] == answers[1] and answers[2] == [], route
        condition = conditions.filter_is(phase.connection, phase.params, "status", sql.Literal("x"))
        assert condition.as_string() == "\"status\" OPERATOR(public.=) 'x'::public.shown"


@pytest.mark.attack
def test_a_function_that_others_have_made_under_our_name_is_neither_replaced_nor_looked_at(
    open_phase: Open, articles: psycopg.Connection[Any]
) -> None:
    """Replaced by a superuser it would stay theirs; with other arguments it may fit a call better than ours."""
    phase = open_phase("80_shadow", shadow={"sample_percent": 100}, accept={"open_schemas": ["public"]})
    articles.execute("CREATE EXTENSION vector")
    with attackers.attacker(articles) as mallory:
        theirs = "real[], integer) RETURNS TABLE (id bigint, score float8, answered_by text) LANGUAGE plpgsql"
        body = "AS 'BEGIN END'"
        attackers.make(articles, mallory, f"CREATE FUNCTION search_articles(text, {theirs} {body}")
        failed = inputs.check(phase.connection, phase.params).failed
        (found,) = (g for g in failed if g.name == "inputs.function_is_nobody_elses")
        assert str(found) == (
            'FAIL    inputs.function_is_nobody_elses   "public".search_articles\n'
            f"  found   public.search_articles(text, real[], integer) of {mallory}\n"
            "  needed  no function of that name whose owner could not change the table\n"
            "  danger  its owner can change what the application calls by that name\n"
            "  do      name another in search.function; or, if nobody calls it:"
            " DROP ROUTINE public.search_articles(text, real[], integer);"
        )
        with pytest.raises(BadInput, match="its owner can change what the application calls"):
            search_function.apply(phase)
        articles.execute("DROP FUNCTION search_articles(text, real[], integer)")
        search_function.apply(phase)
        attackers.make(articles, mallory, f"CREATE FUNCTION search_articles(query varchar, {theirs} {body}")
        assert (
            search_function.function_state(phase.connection, phase.params)["function"]
            == "search_articles(text,real[],integer,double precision)"
        )  # type: ignore[index]
        assert live_shadow.plan(phase).statements[1].text(phase.connection).count("query varchar") == 0


def session_path(phase: Phase) -> str:
    row = phase.connection.execute("SELECT pg_catalog.current_setting('search_path') AS path").fetchone()
    return str(row["path"]) if row else ""
