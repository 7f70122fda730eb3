"""`runbook operate NAME --undo`: what an operation did is taken back by a run of its own, with claim and record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import make_conninfo

from runbook_lib.cli.main import main
from runbook_lib.core import maintenance_window
from runbook_lib.core.gates import BadInput, GateFailed
from runbook_lib.core.phase import Phase, open_phase
from runbook_lib.core.registry import (
    MIGRATE,
    OPERATE,
    STEPS,
    UNDO_OPERATION,
    following,
    operation_of,
    relied_on,
    rolled_back_by,
    short,
    waits,
)
from runbook_lib.indexes import building
from runbook_lib.operate import partition_by_filter, rebuild_index
from runbook_lib.runner import manifest, selection, sign_off
from tests import migrators, toy
from tests.conftest import DSN_ENV, write_params
from tests.servers import dump
from tests.small_runs import ROOT, ledger_rows, record_of
from tests.small_runs import run as run  # a fixture
from tests.stepping import assert_planned, step, step_all, told_in_a_plan
from tests.test_serve_filters import APART, NAMED, TARGET, many_rows
from tests.test_server_versions import SECTIONS

REBUILD, SERVE, DIVIDE = "operate/rebuild_index", "operate/serve_filters", "operate/partition_by_filter"
UNDO_OF = {operation_of(name): name for name in UNDO_OPERATION}
NO_ROLLBACK = [name for name in OPERATE if name not in UNDO_OF]
ROLE, TIMES = "Anna's Rôle", 4
WAY: dict[str, Any] = SECTIONS | {k: v for k, v in TARGET.items() if k != "tune"} | APART
OPERATIONS: dict[str, dict[str, Any]] = {
    REBUILD: {"index": {"m": 24, "ef_construction": 96}},
    SERVE: {"filters": NAMED},
    DIVIDE: {"partitioning": {"column": "status", "accept_wider_key": True}},
}
ROWS = "SELECT md5(string_agg(t::text, '|' ORDER BY id)) FROM articles t"
# Without the number of the row, which is new each time that a way is written.
WAYS = (
    "SELECT target, filter, value, scan, candidates, iterative_scan, most_scanned, share, recall, p50_ms"
    " FROM runbook.strategy ORDER BY 1, 2, 3"
)


@pytest.fixture(scope="module")
def tuned(server: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a database that a role without more rights than it needs has migrated up to 70_tune, to be copied."""
    dsn = make_conninfo(server, dbname="tuned")
    with psycopg.connect(server, autocommit=True) as admin, pytest.MonkeyPatch.context() as patch:
        admin.execute("CREATE DATABASE tuned")
        with psycopg.connect(dsn, autocommit=True) as connection:
            toy.create_articles(connection)
            many_rows(connection, TIMES)
            patch.setenv(DSN_ENV, migrators.create(connection, ROLE))
        step_all("migrate", MIGRATE[:8], write_params(tmp_path_factory.mktemp("tuned"), **WAY))
    return "tuned"


@pytest.fixture
def copied(server: str, tuned: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A superuser's DSN of a copy of it; the parameters find it as that role. It goes with the server: each DROP
    would wait for a checkpoint.
    """
    name = f"tuned_{time.monotonic_ns()}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [tuned])
        migrators.copied(admin, tuned, name, ROLE)
    dsn = make_conninfo(server, dbname=name)
    monkeypatch.setenv(DSN_ENV, make_conninfo(dsn, user=ROLE))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return dsn


def operate(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["operate", str(path), *arguments])


def newest(folder: Path) -> manifest.Manifest:
    return next(iter(manifest.all_runs(folder / "runs")))[1]


def seen(dsn: str) -> tuple[Any, ...]:
    """The schema, every row of the table, and how each value is searched."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(ROWS).fetchone()
        ways = connection.execute(WAYS).fetchall()
        route = connection.execute("SELECT * FROM runbook.route").fetchall()
    return dump(dsn), rows, ways, route


@pytest.mark.parametrize("name", OPERATIONS)
def test_there_and_back_by_the_command(copied: str, tmp_path: Path, name: str) -> None:
    path, before = write_params(tmp_path, **WAY | OPERATIONS[name]), seen(copied)
    assert operate(path, name, "--undo", "--execute").output.splitlines() == [
        f"✔ nothing to roll back: {name} was never carried out on this target, by its ledger"
    ]

    done = operate(path, name, "--execute")
    assert done.exit_code == 0, done.output
    after = seen(copied)
    assert after != before

    if name == REBUILD:
        planned = operate(path, name, "--undo")
        assert (planned.exit_code, newest(tmp_path).status) == (0, "planned"), planned.output
    assert_planned(UNDO_OF[name], path)
    assert seen(copied) == after, "a plan changes nothing"
    assert ledger_rows(copied, "phase")[-1] == (name, {"verdict": "PASS"})

    undone = operate(path, name, "--undo", "--execute")
    assert undone.exit_code == 0, undone.output
    assert seen(copied) == before
    record = newest(tmp_path)
    assert (record.way, [(p.name, p.status) for p in record.phases]) == (
        "undo",
        [(UNDO_OF[name], "passed")],
    )
    page = (tmp_path / "runs" / record.run_id / "index.html").read_text()
    assert f"Rolled back on public.articles: {name}." in page
    assert CliRunner().invoke(main, ["verify", str(path), record.run_id]).exit_code == 0
    assert ledger_rows(copied, "phase")[-2:] == [
        (UNDO_OF[name], {"verdict": "PASS"}),
        (name, {"verdict": "UNDONE", "by": UNDO_OF[name]}),
    ]

    runs = len(list((tmp_path / "runs").glob("2*")))
    again = operate(path, name, "--undo", "--execute")
    assert again.exit_code == 0
    assert again.output.startswith(f"✔ nothing to roll back: {name} was rolled back at 2")
    assert f"(run {record.run_id})" in again.output
    assert (seen(copied), len(list((tmp_path / "runs").glob("2*")))) == (before, runs)
    step(UNDO_OF[name], path)
    assert seen(copied) == before, "nor does the notebook by hand"
    assert {verdict for verdict, _ in told_in_a_plan(UNDO_OF[name], path)[1]} == {"WOULD PASS"}, "nothing is left"


@pytest.mark.parametrize("stopped_after", ["index.create_hnsw", "rebuild.swap"])
def test_a_way_back_that_is_stopped_goes_on_and_never_forth(
    copied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: str
) -> None:
    path, before = write_params(tmp_path, **WAY | OPERATIONS[REBUILD]), seen(copied)
    step(REBUILD, path)
    done: list[str] = []

    def stopping(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(phase: Phase, statement: Any, *others: Any) -> Any:
            if stopped_after in done:
                raise KeyboardInterrupt
            done.append(statement.name)
            return real(phase, statement, *others)

        return act

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building, "concurrently", stopping(building.concurrently))
        patch.setattr(Phase, "do", stopping(Phase.do))
        step(UNDO_OF[REBUILD], path)
    assert done[-1] == stopped_after and seen(copied) != before
    step(UNDO_OF[REBUILD], path)
    assert seen(copied) == before


def test_an_index_that_was_made_anew_since_is_not_rolled_back(copied: str, tmp_path: Path) -> None:
    path = write_params(tmp_path, **WAY | OPERATIONS[REBUILD])
    step(REBUILD, path)
    step("undo/index", path)
    step("migrate/60_build_index", path)
    here = seen(copied)
    step(UNDO_OF[REBUILD], path)
    assert seen(copied) == here


def test_a_rebuild_that_was_not_swapped_in_is_rolled_back_alone(copied: str, tmp_path: Path) -> None:
    step(REBUILD, write_params(tmp_path, **WAY | OPERATIONS[REBUILD]))
    here = seen(copied)
    path = write_params(tmp_path, **WAY | {"index": {"m": 8, "ef_construction": 96}})
    phase = open_phase(REBUILD, str(path), "half", True)
    phase.require(rebuild_index.check)
    rebuild_index.apply(phase)
    phase.end("was ended by the test", "nothing")
    assert seen(copied) != here
    for _ in range(2):
        step(UNDO_OF[REBUILD], path)
        assert seen(copied) == here, "the rebuild before it stays"


def test_once_the_ordinary_table_is_retired_nothing_is_rolled_back(copied: str, tmp_path: Path) -> None:
    path = write_params(tmp_path, **WAY | OPERATIONS[DIVIDE])
    step(DIVIDE, path)
    phase = open_phase(DIVIDE, str(path), "retiring", True)
    phase.require()
    partition_by_filter.retire(phase)
    phase.end("was ended by the test", "nothing")
    here = seen(copied)
    with pytest.raises(GateFailed) as refused:
        step(UNDO_OF[DIVIDE], path)
    assert str(refused.value.gates.failed[0]) == (
        "FAIL    partitioning.ordinary_table_is_kept   public.articles\n"
        "  found   the partitioned table serves alone\n"
        "  needed  the ordinary table, serving or kept\n"
        "  danger  nothing is left to go back to: nothing was changed\n"
        "  do      leave it partitioned; nothing but a copy by hand makes one table of it again"
    )
    assert seen(copied) == here


@pytest.mark.parametrize("name", NO_ROLLBACK)
def test_what_has_no_way_back_says_why_and_starts_nothing(tmp_path: Path, name: str) -> None:
    result = operate(write_params(tmp_path), name, "--undo", "--execute")
    why, do = STEPS[name].no_rollback, STEPS[name].instead
    assert why and do
    assert result.exit_code == 2
    assert result.output.splitlines() == [
        f"FAIL    runner.operation_has_a_way_back   {name}",
        f"  found   {why}",
        f"  needed  one of {', '.join(UNDO_OF)}",
        "  danger  a record would say that something was rolled back; nothing was started",
        f"  do      {do}",
    ]
    assert not (tmp_path / "runs").exists()


def test_every_operation_has_a_way_back_or_a_reason() -> None:
    assert {name for name in OPERATE if STEPS[name].no_rollback} == set(NO_ROLLBACK)
    assert {STEPS[name].after for name in UNDO_OPERATION} == {"", DIVIDE}
    with pytest.raises(BadInput, match="did you mean rebuild_index"):
        selection.rollback_of_operation("rebuild")


@pytest.mark.parametrize("name", UNDO_OPERATION)
def test_a_way_back_waits_and_rests_as_its_operation_does(name: str) -> None:
    operation = operation_of(name)
    assert waits(name) == waits(operation)
    assert relied_on(name) == (*relied_on(operation), operation)
    assert rolled_back_by(name) == (operation,)
    assert following(name) == following(operation)


@pytest.fixture
def rebuilt(articles: psycopg.Connection[Any], tmp_path: Path) -> Iterator[Phase]:
    """A target of small notebooks whose rebuild is proved by the ledger; the phase holds no claim."""
    phase = open_phase(MIGRATE[0], str(write_params(tmp_path)), "planning", False)
    phase.ledger.create()
    for name in (*MIGRATE, REBUILD):
        replace(phase.ledger, phase=name).append("phase", {"verdict": "PASS"})
    yield phase
    phase.end("was ended by the test", "nothing")


def take_back(run: Callable[..., Any], **options: Any) -> Any:
    return run(first=UNDO_OF[REBUILD], last=UNDO_OF[REBUILD], way="undo", **options)


def test_it_claims_the_target_and_keeps_the_hours(
    rebuilt: Phase, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_phase("60_build_index", str(write_params(tmp_path)), "the-other", True)
    refused, _ = take_back(run)
    other.end("was ended by the test", "nothing")
    assert refused.exit_code == 2 and "the-other" in refused.error
    entered: list[str] = []
    monkeypatch.setattr(maintenance_window, "enter", lambda params, **_: entered.append("window"))
    result, said = take_back(run)
    assert (result.exit_code, entered) == (0, ["window"])
    assert said[0].startswith(f"run {record_of(result).run_id}: undo public.articles, carried out")


def test_it_waits_for_a_sign_off_of_its_own(
    rebuilt: Phase,
    run: Callable[..., Any],
    articles: psycopg.Connection[Any],
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = {"approval": {"phases": [REBUILD]}}
    result, _ = take_back(run, sections=wanted)
    assert (result.exit_code, result.status) == (3, "waiting")
    assert f"let another person run `runbook approve PARAMS {UNDO_OF[REBUILD]}`" in result.error
    assert [phase for phase, _ in ledger_rows(database, "request")] == [UNDO_OF[REBUILD]]
    refused = str(sign_off._refused(UNDO_OF[REBUILD], "found", "needed"))
    assert f"runbook operate PARAMS {short(REBUILD)} --undo --execute" in refused

    articles.execute("CREATE ROLE second_of_undo LOGIN SUPERUSER")
    try:
        with monkeypatch.context() as patch:
            patch.setenv(DSN_ENV, make_conninfo(database, user="second_of_undo"))
            signed = CliRunner().invoke(main, ["approve", str(tmp_path / "toy.yaml"), UNDO_OF[REBUILD], "--yes"])
        assert signed.exit_code == 0, signed.output
        assert take_back(run, sections=wanted)[0].exit_code == 0
        replace(rebuilt.ledger, phase=REBUILD).append("phase", {"verdict": "PASS"})
        assert take_back(run, sections=wanted)[0].exit_code == 3, "a sign-off holds for one time"
    finally:
        articles.execute("DROP OWNED BY second_of_undo; DROP ROLE second_of_undo")


def test_what_a_later_operation_stands_on_stays(rebuilt: Phase, run: Callable[..., Any]) -> None:
    replace(rebuilt.ledger, phase=DIVIDE).append("phase", {"verdict": "PASS"})
    result, _ = take_back(run)
    assert result.exit_code == 1
    assert result.error == (
        f"FAIL    phase.no_later_operation_stands_on_it   {REBUILD}\n"
        f"  found   {DIVIDE} was carried out since\n"
        f"  needed  {DIVIDE} rolled back, or never carried out\n"
        "  danger  what is to be rolled back has become part of what the later one made\n"
        f"  do      run `runbook operate PARAMS {short(DIVIDE)} --undo --execute` first, or leave both as they are"
    )
    replace(rebuilt.ledger, phase=DIVIDE).append("phase", {"verdict": "UNDONE"})
    assert take_back(run)[0].exit_code == 0


def test_other_parameters_take_nothing_back(rebuilt: Phase, tmp_path: Path) -> None:
    replace(rebuilt.ledger, phase=MIGRATE[0]).append("plan", {"fingerprint": "another"})
    phase = open_phase(UNDO_OF[REBUILD], str(write_params(tmp_path)), "other", True)
    with pytest.raises(GateFailed, match="target_is_as_planned"):
        phase.require()
    phase.end("was ended by the test", "nothing")
