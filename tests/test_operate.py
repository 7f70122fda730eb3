"""`runbook operate`: one operation at a time, with the claim, the hours, the sign-off and the record of a phase."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from runbook_lib.cli.main import main
from runbook_lib.core import approval, maintenance_window
from runbook_lib.core.gates import BadInput, NotApproved
from runbook_lib.core.phase import Phase, open_phase
from runbook_lib.core.registry import MIGRATE, OPERATE, STEPS, UNDO, following, relied_on, short, waits
from tests.conftest import write_params
from tests.small_runs import ledger_rows, record_of
from tests.small_runs import run as run  # a fixture

pytestmark = pytest.mark.usefixtures("articles")

REFRESH, REBUILD = "operate/refresh", "operate/rebuild_index"


@pytest.fixture
def migrated(run: Callable[..., Any], tmp_path: Path) -> Iterator[Phase]:
    """A target whose phases are proved by the ledger; the phase holds no claim."""
    run()
    phase = open_phase(MIGRATE[0], str(write_params(tmp_path)), "planning", False)
    for name in MIGRATE:
        replace(phase.ledger, phase=name).append("phase", {"verdict": "PASS"})
    yield phase
    phase.end("was ended by the test", "nothing")


def operate(run: Callable[..., Any], name: str, **options: Any) -> Any:
    return run(first=name, last=name, way="operate", **options)


def test_one_operation_leaves_a_record_like_a_phase(
    migrated: Phase, run: Callable[..., Any], database: str, tmp_path: Path
) -> None:
    result, said = operate(run, REBUILD)
    record = record_of(result)
    assert (record.way, [(p.name, p.status) for p in record.phases]) == ("operate", [(REBUILD, "passed")])
    assert said[0].startswith(f"run {record.run_id}: operate public.articles, carried out")
    assert (REBUILD, {"verdict": "PASS"}) in ledger_rows(database, "phase")
    path = str(write_params(tmp_path))
    assert CliRunner().invoke(main, ["verify", path, result.folder.name]).exit_code == 0


def test_it_rests_on_its_phase(run: Callable[..., Any]) -> None:
    run()
    result, _ = operate(run, REBUILD)
    assert result.exit_code == 1 and "phase.predecessor_passed   60_build_index" in result.error


def test_another_run_keeps_out_a_rebuild_but_not_a_refresh(
    migrated: Phase, run: Callable[..., Any], tmp_path: Path
) -> None:
    other = open_phase("60_build_index", str(write_params(tmp_path)), "the-other", True)
    try:
        refused, _ = operate(run, REBUILD)
        beside, _ = operate(run, REFRESH)
    finally:
        other.end("was ended by the test", "nothing")
    assert refused.exit_code == 2 and "the-other" in refused.error
    assert beside.exit_code == 0, beside.error


def test_a_rebuild_keeps_the_hours_and_a_refresh_does_not(
    migrated: Phase, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []
    monkeypatch.setattr(maintenance_window, "enter", lambda params, **_: entered.append("window"))
    operate(run, REFRESH)
    assert entered == []
    operate(run, REBUILD)
    assert entered == ["window"]


def test_a_sign_off_holds_for_one_time(migrated: Phase, tmp_path: Path, articles: psycopg.Connection[Any]) -> None:
    path = str(write_params(tmp_path, approval={"phases": [REBUILD]}))
    articles.execute("CREATE ROLE second_person LOGIN SUPERUSER")
    try:
        phase = open_phase(REBUILD, path, "asking", True)
        with pytest.raises(NotApproved):
            phase.require()
        (asked,) = [e["body"] for e in phase.ledger.entries() if e["kind"] == "request"]
        articles.execute("SET SESSION AUTHORIZATION second_person")
        signing = replace(phase.ledger, connection=_row_factory(articles))
        bound = {k: v for k, v in asked.items() if k != "plan"}
        signing.append("approval", bound | {"reason": "", "request": 1})
        articles.execute("RESET SESSION AUTHORIZATION")
        assert phase.require().gates[-1].name == "approval.is_given"
        phase.ledger.append("phase", {"verdict": "FAIL"})
        assert phase.require().gates[-1].verdict == "PASS", "what failed half-way goes on"
        phase.ledger.append("phase", {"verdict": "PASS"})
        with pytest.raises(NotApproved, match="there is newer evidence"):
            phase.require()
    finally:
        phase.end("was ended by the test", "nothing")
        articles.execute("DROP ROLE second_person")


def _row_factory(connection: psycopg.Connection[Any]) -> Any:
    connection.row_factory = psycopg.rows.dict_row
    return connection


@pytest.mark.parametrize("name", [n for n in OPERATE if waits(n)])
def test_what_an_operation_rests_on_ends_with_its_phase(name: str) -> None:
    assert relied_on(name)[-1] == STEPS[name].needs
    assert approval.before(name) == list(relied_on(name))
    assert following(name) == "nothing: an operation is complete in itself"


def test_names_are_told_apart() -> None:
    names = [*MIGRATE, *OPERATE, *UNDO]
    assert len(set(names)) == len(names)


def test_a_mistyped_operation_starts_nothing(tmp_path: Path) -> None:
    path = str(write_params(tmp_path))
    result = CliRunner().invoke(main, ["operate", path, "20_wacht", "--execute"])
    assert (result.exit_code, "did you mean monitor?" in result.output) == (2, True)
    result = CliRunner().invoke(main, ["operate", path, "montor", "--execute"])
    assert (result.exit_code, "did you mean monitor?" in result.output) == (2, True)
    with pytest.raises(BadInput, match="operate/rebuild_index"):
        write = write_params(tmp_path, approval={"phases": ["operate/rebuild"]})
        from runbook_lib.core.target import load_params

        load_params(write)


def test_help_names_the_operations() -> None:
    said = CliRunner().invoke(main, ["operate", "--help"]).output
    assert all(short(name) in said for name in OPERATE)
    assert "backfill" in CliRunner().invoke(main, ["help-out", "--help"]).output
