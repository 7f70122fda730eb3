"""The rarer ends of a run: what docs/unattended.md says of them. The commoner ones stand in test_runner.py."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from papermill.exceptions import PapermillExecutionError
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.cli import embedded
from runbook_lib.core import claim, db, maintenance_window
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import open_phase
from runbook_lib.core.registry import NOTEBOOKS_ENV
from runbook_lib.core.target import load_params
from runbook_lib.runner import ending, finishing, manifest, runner, sign_off, stopping, verify
from runbook_lib.runner.kernels import Kernels
from runbook_lib.runner.runner import RunResult
from tests import small_notebooks, toy
from tests.conftest import DSN_ENV, write_params
from tests.network import network
from tests.records import make_manifest
from tests.small_runs import FIRST, GATE, ROOT, SECOND, ledger_rows, record_of, sessions, wait_until
from tests.small_runs import run as run  # a fixture
from tests.stepping import in_another_kernel

SLEEP = "phase.connection.execute('SELECT pg_sleep(60)')"
SLEEPING = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"

EXPAND = "30_expand_schema"

Run = Callable[..., tuple[RunResult, list[str]]]


@pytest.mark.usefixtures("articles")
def test_a_kernel_without_memory_is_a_crash_and_the_run_goes_on_later(run: Run) -> None:
    body = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)); bytearray(2**33)"
    result, _ = run({f"p{FIRST}": body})
    m = record_of(result)
    assert (m.status, result.exit_code, m.phases[0].error) == ("crashed", 4, "MemoryError: ")
    assert run()[0].status == "passed"


@pytest.mark.parametrize(
    ("said", "starts"),
    [([runner.NEVER_STARTED], 2), ([runner.NEVER_STARTED] * 3, 3), (["the first cell was run"], 1)],
)
def test_a_kernel_that_died_before_its_first_cell_is_started_again_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], starts: int
) -> None:
    started: list[str] = []

    def execute(*_: Any, **__: Any) -> str:
        started.append("kernel")
        if len(started) <= len(said):
            raise RuntimeError(said[len(started) - 1])
        return "executed"

    monkeypatch.setattr("papermill.execute_notebook", execute)
    if starts > len(said):
        assert runner._execute(tmp_path, make_manifest(), FIRST, Kernels([])) == "executed"
    else:
        with pytest.raises(RuntimeError, match=said[-1]):
            runner._execute(tmp_path, make_manifest(), FIRST, Kernels([]))
    assert len(started) == starts


@pytest.mark.usefixtures("articles")
def test_a_phase_past_its_time_is_interrupted_and_its_statement_gone(run: Run, database: str) -> None:
    seen: list[float] = []
    over = threading.Event()

    def watch() -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            while not over.wait(0.02):
                if connection.execute(SLEEPING).fetchone() == (1,):
                    seen.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        limit = {"run": {"phase_timeout_minutes": {FIRST: 0.1}}}
        result, _ = run({f"p{FIRST}": SLEEP}, limit, last=SECOND)
    finally:
        over.set()
        watcher.join()
    m = record_of(result)
    assert (m.status, result.exit_code) == ("interrupted", 4)
    assert m.phases[0].error == "stopped by its time limit of 0.1 minutes (run.phase_timeout_minutes)"
    # The limit runs from before the kernel's start, so the statement has less than all of it.
    assert 0 < seen[-1] - seen[0] < 6 + 2
    assert sessions(database, m.run_id) == 0
    assert run()[0].status == "passed"


def test_a_lost_server_is_a_crash_and_the_run_goes_on_after_its_recovery(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="runbook-lost-"))  # a socket's path is short
    data = folder / "data"
    try:
        dsn = embedded.start(data)
        monkeypatch.setenv(DSN_ENV, dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            toy.create_articles(connection)

        def lose() -> None:
            with psycopg.connect(dsn, autocommit=True) as connection:
                wait_until(lambda: connection.execute(SLEEPING).fetchone() == (1,), 30)
            embedded.stop(data, signal.SIGQUIT)

        loser = threading.Thread(target=lose)
        loser.start()
        result, _ = run({f"p{SECOND}": SLEEP}, last=SECOND)
        loser.join()
        m = record_of(result)
        assert (m.status, result.exit_code) == ("crashed", 4)
        assert [p.status for p in m.phases] == ["passed", "crashed"]
        assert m.phases[1].error.startswith(("AdminShutdown: ", "OperationalError: "))
        assert any("could not ask the server whether a statement still runs" in note for note in m.notes)
        assert any("the record could not be sealed in the ledger" in note for note in m.notes)
        embedded.start(data)
        again, said = run(last=SECOND)
        assert (again.status, said[0]) == (
            "passed", f"passed in this database up to {FIRST}; resuming with {SECOND}",
        )  # fmt: skip
    finally:
        embedded.stop(data)
        shutil.rmtree(folder, ignore_errors=True)


def meanwhile(dsn: str, do: Callable[[psycopg.Connection[Any]], Any]) -> threading.Thread:
    """Does something once the phase's statement is at work in the server."""

    def go() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            wait_until(lambda: connection.execute(SLEEPING).fetchone() == (1,), 60)
            do(connection)

    thread = threading.Thread(target=go)
    thread.start()
    return thread


@pytest.mark.attack
@pytest.mark.usefixtures("articles")
def test_a_network_that_passes_nothing_on_ends_the_run_in_bounded_time(
    run: Run, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "LOOK_S", 0.2)
    monkeypatch.setattr(stopping, "LONGEST_SILENCE_S", 5.0)
    with network(database) as way:
        monkeypatch.setenv(DSN_ENV, way.dsn)
        cut = meanwhile(database, lambda _: way.cut())
        result, _ = run({f"p{FIRST}": SLEEP})
        cut.join()
        m = record_of(result)
        assert (m.status, result.exit_code) == ("interrupted", 4)
        assert m.phases[0].error == "stopped by the silence of the server for 60 s"
        assert any("could not ask the server whether a statement still runs" in note for note in m.notes)
    wait_until(lambda: sessions(database) == 0, 30)


@pytest.mark.attack
def test_a_server_on_another_timeline_is_said_once(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    p = request.getfixturevalue("open_phase")().params
    for timeline in (None, None, 7, 7):
        if timeline:
            block = replace(runner.SQL["timeline"], text=f"SELECT {timeline} AS timeline")
            monkeypatch.setitem(runner.SQL, "timeline", block)
        runner._note_server(p, make_manifest(), said.append)
    assert said == [
        "the server is on timeline 7, and was on 1: a standby was promoted, or a backup recovered; what had not"
        " reached it is done again, as its ledger says"
    ]


@pytest.mark.attack
@pytest.mark.usefixtures("articles")
def test_a_run_that_has_lost_its_claim_stops(run: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOK_S", 0.2)
    claims = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'runbook-runner %-%'"
    ended = meanwhile(database, lambda connection: connection.execute(claims))
    result, _ = run({f"p{FIRST}": SLEEP})
    ended.join()
    assert (result.status, result.exit_code) == ("interrupted", 4)
    assert result.error == (
        "stopped by the loss of its claim on the target: the server has ended the runner's session"
    )


@pytest.mark.usefixtures("articles")
def test_a_file_that_does_not_fit_is_a_crash_that_says_so(database: str, tmp_path: Path) -> None:
    """As on a full disk, writes fail half-way: here at a limit of the file's size, which the notebook passes."""
    # In lines: nbclient takes minutes to look for carriage returns in one line of this length.
    body = "print('much\\n' * 100_000)"
    small_notebooks.write(tmp_path / "nb", **{f"p{FIRST}": body})
    limit = 200_000
    environment = os.environ | {NOTEBOOKS_ENV: str(tmp_path / "nb"), "IPYTHONDIR": str(tmp_path / "ipython")}
    command = [
        sys.executable,
        "-c",
        "from runbook_lib.cli.main import main; main()",
        "run",
        "--execute",
        "--to",
        FIRST,
    ]
    done = subprocess.run(
        [*command, str(write_params(tmp_path))], cwd=ROOT, env=environment, text=True, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    (folder,) = (tmp_path / "runs").glob("2*/")
    m = manifest.read(folder)
    assert (m.status, m.phases[0].status) == ("crashed", "crashed")
    assert "crashed" in (folder / "index.html").read_text()
    assert sessions(database, m.run_id) == 0


@pytest.mark.usefixtures("articles")
def test_pages_that_cannot_be_written_cost_the_exit_code_and_are_written_later(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database: str
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runbook_lib.runner.record.write", full)
    result, said = run()
    assert result.folder is not None
    m = manifest.read(result.folder)
    assert (m.status, m.exit_code, result.exit_code) == ("passed", 4, 4)
    why = "a page of the record could not be written: [Errno 28] No space left on device; make room, then"
    assert m.notes == (f"{why} `runbook record PARAMS {m.run_id}`",)
    assert m.notes[0] in said and result.error == m.notes[0]
    p = load_params(tmp_path / "toy.yaml")
    gate = next(g for g in verify.check(p, m.run_id).failed if g.name.startswith("record.ends"))
    assert (gate.name, gate.do) == (
        "record.ends_with_its_seal",
        f"make room, then `runbook record PARAMS {m.run_id}`",
    )
    monkeypatch.undo()
    monkeypatch.setenv(DSN_ENV, database)
    page = finishing.write_again(tmp_path / "toy.yaml", m.run_id)
    assert page.is_file() and not verify.check(p, m.run_id).failed
    with pytest.raises(BadInput, match="sealed whole by row"):
        finishing.write_again(tmp_path / "toy.yaml", m.run_id)


@pytest.mark.usefixtures("articles")
def test_a_record_that_cannot_be_sealed_costs_the_exit_code_and_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lost(*_args: Any) -> None:
        raise psycopg.OperationalError("the server closed the connection")

    monkeypatch.setattr(verify, "seal", lost)
    result, said = run()
    m = record_of(result)
    note = "the record could not be sealed in the ledger: the server closed the connection"
    assert (m.status, m.exit_code, result.exit_code, m.notes) == ("passed", 4, 4, (note,))
    assert note in said and result.error == note
    unsealed = verify.check(load_params(tmp_path / "toy.yaml"), m.run_id).failed
    assert [g.name for g in unsealed] == ["record.is_sealed"]
    with pytest.raises(BadInput, match="not sealed"):
        finishing.write_again(tmp_path / "toy.yaml", m.run_id)


def test_a_phase_waits_for_its_sign_off_and_is_carried_out_after_it(
    run: Run, articles: psycopg.Connection[Any], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = {"approval": {"phases": [SECOND]}}
    result, _ = run(sections=waiting, last=SECOND)
    m = record_of(result)
    assert (m.status, result.exit_code, [p.status for p in m.phases]) == ("waiting", 3, ["passed", "waiting"])
    assert f"let another person run `runbook approve PARAMS {SECOND}`" in m.phases[1].error
    assert "waits for approval" in (result.folder / "index.html").read_text()
    assert ledger_rows(database, "run")[-1][1]["status"] == "waiting"

    name = f"second_{abs(hash(database)):x}"
    role = sql.Identifier(name)
    articles.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    try:
        articles.execute(sql.SQL("GRANT USAGE ON SCHEMA runbook TO {}").format(role))
        articles.execute(sql.SQL("GRANT SELECT ON runbook.entry TO {}").format(role))
        articles.execute(sql.SQL("GRANT EXECUTE ON FUNCTION runbook.sign_off TO {}").format(role))
        p = load_params(write_params(tmp_path, **waiting))
        with monkeypatch.context() as patch:
            patch.setenv(DSN_ENV, make_conninfo(database, user=name))
            with db.connect(p, "the second person") as connection:
                sign_off.approve(connection, p, sign_off.pending(connection, p, SECOND), "read")
        again, _ = run(sections=waiting, last=SECOND)
    finally:
        articles.execute(sql.SQL("DROP OWNED BY {}").format(role))
        articles.execute(sql.SQL("DROP ROLE {}").format(role))
    assert again.status == "passed", again.error
    assert (again.status, [p.name for p in record_of(again).phases]) == ("passed", [SECOND])
    assert f"by {name} at " in (again.folder / "index.html").read_text()


@pytest.mark.usefixtures("articles")
def test_outside_the_window_a_changing_phase_does_not_begin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance_window, "is_open", lambda *_: False)
    hours = {"run": {"window": "22:00-05:00", "outside_window": "stop"}}
    result, _ = run(sections=hours, last=SECOND)
    m = record_of(result)
    assert (m.status, result.exit_code, [p.status for p in m.phases]) == ("waiting", 3, ["passed", "waiting"])
    assert "needed  the maintenance window, 22:00-05:00; it opens at " in m.phases[1].error
    assert not (result.folder / f"{SECOND}.ipynb").exists()


@pytest.mark.usefixtures("articles")
def test_a_second_run_is_refused_between_two_phases_of_the_first(run: Run, tmp_path: Path) -> None:
    path = write_params(tmp_path)
    p = load_params(path)
    with claim.held_by_runner(p, "the-first-run"):
        result, _ = run()
        m = record_of(result)
        assert (m.status, result.exit_code, m.phases[0].status) == ("failed", 2, "failed")
        assert m.phases[0].error.startswith("FAIL    phase.target_is_free   articles\n  found   pid ")
        assert "runbook-runner the-first-run, postgres, since " in m.phases[0].error
        with pytest.raises(BadInput, match="runbook-runner the-first-run"):
            open_phase(FIRST, str(path), "by-hand", True)
        own = open_phase(FIRST, str(path), "the-first-run", True)
        try:
            with in_another_kernel(), pytest.raises(BadInput, match="runbook the-first-run 00_preflight ledger"):
                open_phase(FIRST, str(path), "the-first-run", True)
        finally:
            own.end("was ended by the test", "nothing")
    assert run()[0].status == "passed"


@pytest.mark.usefixtures("articles")
def test_a_failed_hook_is_noted_and_changes_nothing_else(run: Run) -> None:
    result, said = run({f"p{FIRST}": GATE}, {"notify": {"command": ["/no/such/program"]}})
    m = record_of(result)
    notes = [
        f"notify.command did not take the event {event}: No such file or directory"
        for event in ("gate_failed", "end")
    ]
    assert (m.status, result.exit_code, list(m.notes)) == ("failed", 1, notes)
    assert said[-3:-1] == notes


@pytest.mark.usefixtures("articles")
def test_verbose_lines_carry_time_and_run(run: Run) -> None:
    result, said = run(verbose=True)
    assert result.folder is not None
    stamps = [line.split(" ", 2) for line in said]
    assert {run_id for _, run_id, _ in stamps} == {result.folder.name}
    assert stamps[1][2] == f"▸ {FIRST}" and stamps[0][0].endswith("+00:00")


@pytest.mark.usefixtures("articles")
def test_a_plan_shows_each_statement_with_its_lock_and_no_gate_as_passed(run: Run) -> None:
    prove = "from runbook_lib.migrate import expand_schema; phase.prove(expand_schema.verify)"
    result, _ = run({f"p{EXPAND}": prove}, execute=False, first=EXPAND, last=EXPAND)
    assert (result.status, result.exit_code) == ("planned", 0)
    page = (result.folder / "index.html").read_text()
    assert "Statements that would be carried out" in page and "ACCESS EXCLUSIVE" in page
    assert "every read and write" in page and "ADD COLUMN" in page
    assert "NOT RUN · expand_schema.verify" in page and "PASS ·" not in page


def test_a_plan_leaves_a_proved_ledger_as_it_is(run: Run, articles: psycopg.Connection[Any]) -> None:
    run(last=SECOND)
    count = "SELECT count(*) FROM runbook.entry"
    before = articles.execute(count).fetchone()
    look = "from runbook_lib.core.gates import Gates; phase.prove(lambda p: Gates(()))"
    result, _ = run({f"p{FIRST}": look}, execute=False)
    assert (result.status, articles.execute(count).fetchone()) == ("planned", before)


@pytest.mark.parametrize(
    ("gate", "status"), [("db.server_is_reachable", "crashed"), ("phase.target_is_free", "failed")]
)
def test_a_server_that_is_lost_between_two_sessions_of_a_notebook_is_a_crash(gate: str, status: str) -> None:
    """The runner had reached it before it began the notebook; bad input would have been found by then."""
    raised = PapermillExecutionError(3, 2, "phase = open_phase(…)", "BadInput", f"\nFAIL    {gate}   the server", [])
    assert str(ending.of_error(raised).status) == status
