"""A role that is no superuser, as on managed services: what it needs; a missing right is found before the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from runbook_lib.benchmark import comparison
from runbook_lib.core.gates import Gate, GateFailed
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.migrate import inputs
from runbook_lib.params import Params
from tests import migrators, toy
from tests.conftest import DSN_ENV, write_params
from tests.servers import dump
from tests.stepping import step_all
from tests.test_migration import rows
from tests.test_server_versions import SECTIONS

ROLE, APPLICATION = "migrator", "the application"


@pytest.fixture
def migrator(articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection[Any]]:
    """The parameters connect as a role with exactly these rights; a superuser's connection."""
    articles.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(APPLICATION)))
    monkeypatch.setenv(DSN_ENV, migrators.create(articles, ROLE))
    try:
        yield articles
    finally:
        articles.execute(sql.SQL("REASSIGN OWNED BY migrator TO CURRENT_USER; DROP OWNED BY migrator"))
        articles.execute(
            sql.SQL("DROP OWNED BY {r}; DROP ROLE {r}; DROP ROLE migrator").format(r=sql.Identifier(APPLICATION))
        )


def test_there_and_back_with_the_least_rights(
    migrator: psycopg.Connection[Any], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)
    path = write_params(tmp_path, **SECTIONS | {"search": {"fulltext_column": "tsv", "grant_to": [APPLICATION]}})
    migrator.execute(sql.SQL("GRANT SELECT ON articles TO {}").format(sql.Identifier(APPLICATION)))
    before, own_rows = dump(database), rows(migrator)
    step_all("migrate", MIGRATE, path)
    migrator.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(APPLICATION)))
    answer = migrator.execute(
        "SELECT id, answered_by"
        " FROM search_articles('cookie leaks', (SELECT embedding FROM articles WHERE id = 3), 3)"
    ).fetchall()
    assert toy.as_near_as_row_3(answer[0])
    migrator.execute("RESET ROLE")
    step_all("undo", UNDO, path)
    assert dump(database) == before
    assert rows(migrator) == own_rows


def missing(make_params: Callable[..., Params], **sections: dict[str, Any]) -> list[Gate]:
    """The gates that stop the run before it starts."""
    return list(inputs.input_problems(make_params(**sections)).failed)


@pytest.mark.parametrize(
    ("take", "gate", "do"),
    [
        (
            "ALTER TABLE articles OWNER TO postgres; GRANT SELECT ON articles TO migrator",
            "inputs.owns_table",
            "GRANT postgres TO migrator;",
        ),
        (
            "REVOKE CREATE ON SCHEMA public FROM migrator",
            "inputs.may_create_in_schema",
            'GRANT CREATE ON SCHEMA "public" TO migrator;',
        ),
        (
            "REVOKE CREATE ON DATABASE {database} FROM migrator",
            "inputs.may_make_ledger",
            "GRANT CREATE ON DATABASE {database} TO migrator;",
        ),
        (
            "REVOKE CREATE ON DATABASE {database} FROM migrator; CREATE SCHEMA runbook",
            "inputs.may_make_ledger",
            "GRANT USAGE, CREATE ON SCHEMA runbook TO migrator;",
        ),
        (
            "REVOKE TEMPORARY ON DATABASE {database} FROM migrator",
            "inputs.may_make_temporary_tables",
            "GRANT TEMPORARY ON DATABASE {database} TO migrator;",
        ),
        (
            "CREATE SCHEMA ext; ALTER EXTENSION vector SET SCHEMA ext",
            "inputs.may_use_extension",
            "GRANT USAGE ON SCHEMA ext TO migrator;",
        ),
        (
            "DROP EXTENSION vector",
            "inputs.may_make_extension",
            "CREATE EXTENSION vector;",
        ),
    ],
)
def test_each_missing_right_is_named_with_its_grant(
    migrator: psycopg.Connection[Any], make_params: Callable[..., Params], take: str, gate: str, do: str
) -> None:
    assert missing(make_params) == [], "with the rights of docs/guide.md nothing is missing"
    database = migrator.info.dbname
    for statement in take.format(database=database).split(";"):
        migrator.execute(statement)  # type: ignore[call-overload]
    found = missing(make_params, extension={"schema": "ext" if "SCHEMA ext" in take else "public"})
    assert [g.name for g in found] == [gate]
    do = do.format(database=database)
    assert found[0].do in (f"have the owner or a superuser run: {do}", f"have a superuser run in this database: {do}")
    if "OWNER TO" not in take and "ext" not in take.lower():
        migrator.execute(do)  # type: ignore[call-overload]
        assert missing(make_params) == [], "the grant that the message says is enough"


@pytest.mark.attack
def test_forced_row_security_would_hide_rows(
    migrator: psycopg.Connection[Any], make_params: Callable[..., Params]
) -> None:
    migrator.execute("ALTER TABLE articles ENABLE ROW LEVEL SECURITY")
    # An owner sees every row; who searches them has to be named.
    nobody = ("inputs.callers_under_policies_can_be_asked", "name the application's role in search.grant_to")
    assert [(g.name, g.do) for g in missing(make_params)] == [nobody]
    assert [(g.name, g.do) for g in missing(make_params, vector={"layout": "side_table"})] == [
        (
            "inputs.policies_hold_for_vectors",
            "set vector.layout: column; if the vectors are in a side table already, undo/schema first",
        ),
        nobody,
    ]
    migrator.execute("ALTER TABLE articles FORCE ROW LEVEL SECURITY")
    assert str(missing(make_params)[0]) == (
        'FAIL    inputs.sees_every_row   "public"."articles"\n'
        "  found   row security is forced on the owner too, and migrator does not bypass it\n"
        "  needed  a role that sees every row\n"
        "  danger  rows that this role does not see would get no vector, and no count would miss them\n"
        "  do      have a superuser run: ALTER ROLE migrator BYPASSRLS;"
    )


def test_a_ledger_made_by_somebody_else_must_be_open_to_the_callers(
    migrator: psycopg.Connection[Any], make_params: Callable[..., Params]
) -> None:
    migrator.execute("CREATE SCHEMA runbook; GRANT USAGE, CREATE ON SCHEMA runbook TO migrator")
    sections = {"search": {"grant_to": [APPLICATION]}}
    assert str(missing(make_params, **sections)[0]) == (
        "FAIL    inputs.callers_may_read_route   search.grant_to\n"
        '  found   "the application": no USAGE on schema runbook, which migrator may not pass on\n'
        "  needed  USAGE on it, or a role that may grant it\n"
        "  danger  PostgreSQL would only warn, and the application's calls would fail at the route table\n"
        '  do      have its owner or a superuser run: GRANT USAGE ON SCHEMA runbook TO "the application";'
    )
    migrator.execute('GRANT USAGE ON SCHEMA runbook TO "the application"')
    assert missing(make_params, **sections) == []


def test_sessions_that_it_may_not_see_are_said(migrator: psycopg.Connection[Any], tmp_path: Path) -> None:
    migrator.execute("REVOKE pg_read_all_stats FROM migrator")
    path = write_params(tmp_path, **SECTIONS)
    with pytest.raises(GateFailed) as raised:
        step_all("migrate", MIGRATE[:1], path)
    assert [(g.name, g.do) for g in raised.value.gates.failed] == [
        ("preflight.no_old_snapshot", "have a superuser run: GRANT pg_read_all_stats TO migrator;")
    ]
