"""``runbook search``: every route's rows side by side, from the live function, and nothing changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

from runbook_lib.cli import search as search_command
from runbook_lib.cli.main import main
from runbook_lib.cli.search import Answer, shown
from runbook_lib.core import db
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.params import Params
from runbook_lib.search import search_function, statements
from tests.conftest import write_params
from tests.test_search_function import FILTERED, call, keys

FULLTEXT = {"search": {"fulltext_column": "tsv"}}


@pytest.fixture
def migrated(open_phase: Callable[..., Phase], tmp_path: Path) -> tuple[Phase, Path]:
    phase = open_phase("70_tune", **FILTERED, **FULLTEXT)
    for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    return phase, write_params(tmp_path, **FILTERED, **FULLTEXT)


def asked(path: Path, *args: str) -> Any:
    return CliRunner().invoke(main, ["search", str(path), "cookie leaks", *args], env={"COLUMNS": "120"})


def test_each_route_shows_the_rows_that_it_finds_and_nothing_is_changed(
    migrated: tuple[Phase, Path], articles: psycopg.Connection[Any]
) -> None:
    phase, path = migrated
    search_function.move_route(phase, "vector", 30, "test")
    result = asked(path, "--k", "4")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "calls are answered by: vector for 30 % of the texts, legacy for the others"
    assert [cell.split(",")[0].strip() for cell in lines[1].split("  ") if cell] == ["legacy", "vector", "hybrid"]
    assert len(lines) == 3 + 4
    search_function.move_route(phase, "vector", 100, "test")
    nearest = call(articles, "cookie leaks", 4)
    for line, row in zip(lines[3:], nearest, strict=True):
        assert f"{row['rank']:>3} {row['similarity']:.3f} {row['id']} " in line
    assert search_function.current_route(phase.connection, phase.params) == ("vector", 100)


def test_filters_reach_every_route_and_an_unknown_one_is_named(migrated: tuple[Phase, Path]) -> None:
    _, path = migrated
    result = asked(path, "--filter", "status=no such status")
    assert result.exit_code == 0 and result.stdout.count("no row") == 3
    result = asked(path, "--filter", "colour=red")
    assert result.exit_code == 2 and "--filter colour: target.filters has status, views" in result.output


def test_before_the_vectors_are_there_legacy_answers_and_the_others_say_why_not(
    open_phase: Callable[..., Phase], tmp_path: Path
) -> None:
    path = write_params(tmp_path, **FILTERED, **FULLTEXT)
    result = asked(path)
    assert result.exit_code == 2 and "search.function_is_there" in result.output
    search_function.apply(open_phase("10_baseline", **FILTERED, **FULLTEXT))
    result = asked(path)
    assert result.exit_code == 0 and "calls are answered by: legacy" in result.output
    assert result.stdout.splitlines()[1].startswith("legacy, ") and "vector: the server says: " in result.output


def test_a_route_that_takes_too_long_is_left_out_and_where_none_answers_the_command_fails(
    migrated: tuple[Phase, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = migrated
    of_route = search_command._by

    def by(connection: db.Connection, params: Params, route: str, values: Any) -> Answer:
        if route in slow:
            monkeypatch.setattr(
                statements, "filtered_call_statement", lambda *_, **__: sql.SQL("SELECT pg_sleep(60)")
            )
        try:
            return of_route(connection, params, route, values)
        finally:
            monkeypatch.setattr(statements, "filtered_call_statement", call_statement)

    call_statement = statements.filtered_call_statement
    monkeypatch.setattr(search_command, "_by", by)
    monkeypatch.setattr(search_command, "LONGEST_SEARCH", "300 ms")
    slow = ["legacy"]
    result = asked(path)
    assert (
        result.exit_code == 0
        and "legacy: the server says: canceling statement due to statement timeout" in result.stderr
    )
    assert result.stdout.splitlines()[1].startswith("vector, ")
    slow = ["legacy", "vector", "hybrid"]
    result = asked(path)
    assert (result.exit_code, result.stdout.splitlines()[1:]) == (1, ["no route answered"])


def test_a_narrow_terminal_shows_the_routes_below_each_other_and_cuts_each_line() -> None:
    rows = [{"id": 7, "similarity": 0.5, "rank": 1}]
    answers = [Answer("vector", 1.25, rows), Answer("hybrid", 2, [])]
    text = shown(answers, {7: "a text\nthat is longer than the line is wide, by far"}, 40)
    assert text.splitlines() == [
        "vector, 1.2 ms",
        "-" * 40,
        "  1 0.500 7 a text that is longer than the line is wide, by far"[:40],
        "",
        "hybrid, 2.0 ms",
        "-" * 40,
        "no row",
    ]


def test_the_keys_of_the_function_are_those_that_are_shown(migrated: tuple[Phase, Path]) -> None:
    phase, path = migrated
    found = keys(call(phase.connection, "cookie leaks", 3))
    assert all(f" {key} " in asked(path, "--k", "3").stdout for key in found)
