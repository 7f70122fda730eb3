"""How a run may end, and that its record says so. The notebooks are small; papermill, kernel and server are real."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import psycopg
import pytest

from runbook_lib.cli import main
from runbook_lib.core import plans
from runbook_lib.core.gates import BadInput
from runbook_lib.core.registry import NOTEBOOKS_ENV
from runbook_lib.core.target import load_params
from runbook_lib.params import Params
from runbook_lib.runner import finishing, folders, manifest, record, runner, verify
from tests import small_notebooks
from tests.conftest import write_params
from tests.records import make_manifest
from tests.small_runs import FIRST, GATE, ROOT, SECOND, ledger_rows, record_of, sessions, wait_until
from tests.small_runs import run as run  # a fixture

pytestmark = pytest.mark.usefixtures("articles")


def test_a_run_that_passes(run: Callable[..., Any], database: str) -> None:
    result, said = run(last=SECOND)
    m = record_of(result)
    assert (result.status, result.exit_code, m.status, m.exit_code) == ("passed", 0, "passed", 0)
    assert [(p.name, p.status) for p in m.phases] == [(FIRST, "passed"), (SECOND, "passed")]
    assert m.versions["PostgreSQL"] and m.parameters["target"]["table"] == "articles"
    assert [line.split()[:3] for line in said[1:-1]] == [["✔", FIRST, "passed"], ["✔", SECOND, "passed"]]
    assert said[-1] == f"the ledger ends with {m.head}" and result.head == m.head
    hashes = {p.name: p.sha256 for p in m.phases}
    assert {phase: body["sha256"] for phase, body in ledger_rows(database, "notebook")} == hashes
    for name, sha256 in hashes.items():
        assert hashlib.sha256((result.folder / f"{name}.ipynb").read_bytes()).hexdigest() == sha256
        assert (result.folder / f"{name}.html").is_file()
    assert [body["status"] for _, body in ledger_rows(database, "run")] == ["started", "passed"]
    assert m.run_id in (result.folder.parent / "index.html").read_text()


def test_where_nothing_was_carried_out_nothing_is_rolled_back(run: Callable[..., Any], database: str) -> None:
    result, said = run(way="undo", last=None)
    assert (result.folder, result.exit_code) == (None, 0)
    why = "nothing was carried out in this database, which has no ledger in schema runbook"
    assert said == [f"✔ nothing to roll back: {why}"]
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT to_regnamespace('runbook')").fetchone() == (None,)


def test_a_run_goes_on_after_what_is_proved(run: Callable[..., Any]) -> None:
    run(last=FIRST)
    result, said = run(last=SECOND)
    assert [p.name for p in record_of(result).phases] == [SECOND]
    assert said[0] == f"passed in this database up to {FIRST}; resuming with {SECOND}"
    result, said = run(last=SECOND)
    assert (result.folder, result.exit_code) == (None, 0)
    assert said == [f"✔ nothing left to do: {SECOND} has passed in this database"]


def test_a_plan_claims_nothing(run: Callable[..., Any], database: str) -> None:
    result, _ = run(execute=False)
    assert (result.status, result.exit_code, record_of(result).status) == ("planned", 0, "planned")
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT to_regnamespace('runbook')").fetchone() == (None,)


def test_a_gate_that_does_not_pass_ends_the_run(run: Callable[..., Any]) -> None:
    result, said = run({f"p{FIRST}": GATE}, last=SECOND)
    m = record_of(result)
    assert (m.status, m.exit_code, result.exit_code) == ("failed", 1, 1)
    assert [p.status for p in m.phases] == ["failed", "pending"]
    assert m.phases[0].error.splitlines()[:2] == ["FAIL    toy.fact_holds   articles", "  found   this"]
    assert said[-2] == m.phases[0].error
    page = (result.folder / "index.html").read_text()
    assert "✘ failed" in page and "toy.fact_holds" in page


@pytest.mark.parametrize(
    ("body", "status", "exit_code", "error"),
    [
        ("1 / 0", "crashed", 4, "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(0)", "crashed", 4, "by the ledger it wrote no verdict"),
        ("import os; os._exit(1)", "crashed", 4, "the kernel died"),
        ("import os; os.kill(os.getpid(), 9)", "crashed", 4, "the kernel died"),
        ("raise KeyboardInterrupt", "interrupted", 4, ""),
        (
            "from runbook_lib.core.gates import NotApproved; raise NotApproved('f', 'n', 'd', 'do')",
            "waiting",
            3,
            "found   f",
        ),
        ("phase.connection.execute('SELECT pg_terminate_backend(pg_backend_pid())')", "crashed", 4, "AdminShutdown"),
    ],
)
def test_an_end_that_papermill_would_not_tell(
    run: Callable[..., Any], database: str, body: str, status: str, exit_code: int, error: str
) -> None:
    result, _ = run({f"p{FIRST}": body}, last=SECOND)
    m = record_of(result)
    assert (m.status, m.exit_code, result.exit_code) == (status, exit_code, exit_code)
    assert error in m.phases[0].error
    assert m.phases[1].status == "pending"
    executed = nbformat.read(result.folder / f"{FIRST}.ipynb", as_version=4)
    assert executed.metadata.runbook["status"] == status
    states = [c.metadata.papermill.status for c in executed.cells if "papermill" in c.metadata]
    assert states[-1] == "pending" and states[-2] in ("failed", "interrupted")
    assert sessions(database, m.run_id) == 0


def test_sys_exit_in_a_plan_is_no_plan(run: Callable[..., Any]) -> None:
    result, _ = run({f"p{FIRST}": "import sys; sys.exit(0)"}, execute=False)
    assert (result.status, result.exit_code) == ("crashed", 4)


def test_a_statement_does_not_outlive_its_kernel(run: Callable[..., Any], database: str) -> None:
    body = (
        "import threading, os, time; threading.Timer(1, lambda: os.kill(os.getpid(), 9)).start();"
        "phase.connection.execute('SELECT pg_sleep(60)')"
    )
    result, _ = run({f"p{FIRST}": body})
    assert (result.exit_code, sessions(database, record_of(result).run_id)) == (4, 0)


def test_another_run_at_work_is_named_and_nothing_is_started(run: Callable[..., Any], tmp_path: Path) -> None:
    from runbook_lib.core.phase import open_phase

    first = open_phase(FIRST, str(write_params(tmp_path)), "the-other", True)
    try:
        result, _ = run()
    finally:
        first.end("was ended by the test", "nothing")
    m = record_of(result)
    assert (m.status, result.exit_code) == ("failed", 2)
    assert "phase.target_is_free" in m.phases[0].error and "the-other" in m.phases[0].error


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_the_statement_within_two_seconds_and_leaves_a_record(
    run: Callable[..., Any], database: str, tmp_path: Path, sent: signal.Signals
) -> None:
    small_notebooks.write(tmp_path / "nb", **{f"p{FIRST}": "phase.connection.execute('SELECT pg_sleep(60)')"})
    environment = os.environ | {NOTEBOOKS_ENV: str(tmp_path / "nb")}
    command = [sys.executable, "-c", "from runbook_lib.cli.main import main; main()", "run", "--execute"]
    process = subprocess.Popen(
        [*command, str(write_params(tmp_path))], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
    with psycopg.connect(database, autocommit=True) as watch:
        wait_until(lambda: watch.execute(sleeping).fetchone() == (1,), 30)
        process.send_signal(sent)
        wait_until(lambda: watch.execute(sleeping).fetchone() == (0,), 2)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 4, err
    assert f"■ {FIRST}" in err and "interrupted" in out and "Traceback" not in err
    (folder,) = (tmp_path / "runs").glob("2*/")
    m = manifest.read(folder)
    assert (m.status, m.exit_code, m.phases[0].status, m.phases[0].error) == (
        "interrupted", 4, "interrupted", f"stopped by {sent.name}",
    )  # fmt: skip
    assert "interrupted" in (folder / "index.html").read_text()
    assert sessions(database, m.run_id) == 0
    result, _ = run()
    assert result.status == "passed"


def test_a_runner_that_was_killed_is_found_out_by_the_next_run(run: Callable[..., Any]) -> None:
    result, _ = run(execute=False)
    path = result.folder / manifest.FILE
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    data = json.loads(path.read_text()) | {"status": "running", "exit_code": None, "finished": "", "pid": gone.pid}
    data["phases"][0]["status"] = "running"
    path.write_text(json.dumps(data))
    run(execute=False)
    settled = manifest.read(result.folder)
    assert (settled.status, settled.exit_code, settled.phases[0].status) == ("interrupted", 4, "interrupted")


def test_a_full_disk_while_saving_is_a_crash_that_says_so(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("papermill.engines.write_ipynb", full)
    result, _ = run()
    m = record_of(result)
    assert (m.status, result.exit_code) == ("crashed", 4)
    assert "No space left on device" in m.phases[0].error


@pytest.mark.parametrize(
    ("options", "found", "do"),
    [
        ({"first": "50_backfil"}, "no such phase", "did you mean 50_backfill?"),
        ({"first": "50_backfill", "last": "10_baseline"}, "10_baseline comes before 50_backfill", "swap them"),
        ({"way": "undo", "last": "30_schema"}, "no such rollback", "did you mean schema?"),
    ],
)
def test_a_wrong_phase_starts_nothing(
    run: Callable[..., Any], tmp_path: Path, options: dict[str, Any], found: str, do: str
) -> None:
    with pytest.raises(BadInput) as error:
        run(**options)
    assert (error.value.found, error.value.do) == (found, do)
    assert not (tmp_path / "runs").exists()


def test_unusable_inputs_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NOTEBOOKS_ENV, str(small_notebooks.write(tmp_path / "nb")))
    with pytest.raises(BadInput, match="no_such_table"):
        runner.run(write_params(tmp_path, target={"table": "no_such_table"}), execute=False)
    assert not (tmp_path / "runs").exists()


def test_the_way_back_starts_at_its_first_step_and_needs_no_model(run: Callable[..., Any], tmp_path: Path) -> None:
    run()
    result, _ = run(way="undo", last="undo/reads")
    assert [(p.name, p.status) for p in record_of(result).phases] == [("undo/reads", "passed")]


def test_two_runs_in_one_second_keep_apart(make_params: Callable[..., Params]) -> None:
    record = make_params().record
    made = {folders.new_folder(record, "articles") for _ in range(3)}
    assert len(made) == 3


def test_an_absent_notebook_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NOTEBOOKS_ENV, str(tmp_path))
    with pytest.raises(BadInput) as error:
        runner.run(write_params(tmp_path), execute=False)
    assert error.value.found == "no 00_preflight.ipynb"
    assert load_params(tmp_path / "toy.yaml").record.runs_dir.exists() is False


@pytest.mark.attack
def test_a_planted_manifest_ends_no_session_and_writes_nothing_outside(
    run: Callable[..., Any], tmp_path: Path, database: str
) -> None:
    """Neither through a link out of the runs folder, nor by the name of a run that is at work."""
    result, _ = run()
    runs, outside = result.folder.parent, tmp_path / "outside"
    data = json.loads((result.folder / manifest.FILE).read_text())
    data |= {"status": "running", "exit_code": None, "finished": "", "pid": 2**22 + 1, "run_id": "live"}
    outside.mkdir()
    (outside / manifest.FILE).write_text(json.dumps(data))
    (runs / "live").symlink_to(outside)
    for name, changes in {
        "20200101T000000Z-articles": {"run_id": "live"},
        "20200102T000000Z-articles": {"run_id": "20200102T000000Z-articles"},
        "20200103T000000Z-articles": {
            "run_id": "20200103T000000Z-articles", "phases": [data["phases"][0] | {"name": "../../outside/page"}],
        },
    }.items():  # fmt: skip
        (runs / name).mkdir()
        (runs / name / manifest.FILE).write_text(json.dumps(data | changes))
    before = {p: p.read_text() for p in [*outside.iterdir(), *runs.glob(f"2020*/{manifest.FILE}")]}
    names = ("runbook live 50_backfill", "runbook 20200102T000000Z-articles 50_backfill")
    with psycopg.connect(database, application_name=names[0]) as one, psycopg.connect(
        database, application_name=names[1]
    ) as two:  # fmt: skip
        for execute in (False, True):
            run(execute=execute)
        for session in (one, two):
            assert session.execute("SELECT 1").fetchone() == (1,)
    assert {p: p.read_text() for p in before} == before
    assert set(outside.iterdir()) == {outside / manifest.FILE}


@pytest.mark.attack
@pytest.mark.parametrize(
    ("readable_by", "of_folder", "of_file"),
    [("owner", 0o700, 0o600), ("group", 0o750, 0o640), ("everyone", 0o755, 0o644)],
)
def test_at_no_time_can_others_read_a_record_but_whom_the_parameters_name(
    make_params: Callable[..., Params],
    monkeypatch: pytest.MonkeyPatch,
    readable_by: str,
    of_folder: int,
    of_file: int,
) -> None:
    p = make_params(record={"readable_by": readable_by})
    seen: set[int] = set()
    fsync = os.fsync

    def look(file: int) -> None:
        seen.add(stat.S_IMODE(os.fstat(file).st_mode))
        fsync(file)

    monkeypatch.setattr(os, "fsync", look)
    before = os.umask(0)
    try:
        folder = folders.new_folder(p.record, "articles")
        plans.note(p, folder.name, FIRST, "migrator", "gate", {})
        manifest.write_atomically(folder / "index.html", "a row's text")
        os.umask(0o077)
        closed = folders.new_folder(p.record, "closed")
    finally:
        os.umask(before)
    assert seen == {of_file, of_folder, 0o600, 0o700}
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()} == {of_file}
    assert [stat.S_IMODE(f.stat().st_mode) for f in (folder, folder.parent, closed)] == [of_folder, of_folder, 0o700]


@pytest.mark.attack
def test_a_link_in_the_place_of_an_unfinished_file_is_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    (tmp_path / f".page.{os.getpid()}.unfinished").symlink_to(kept)
    manifest.write_atomically(tmp_path / "page", "new")
    assert (kept.read_text(), (tmp_path / "page").read_text()) == ("mine", "new")


@pytest.mark.attack
def test_a_run_that_began_by_the_ledger_and_lost_its_runner_is_settled_once(
    run: Callable[..., Any], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it ran, and not while its runner is connected, be it from another machine of the same name."""
    run()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    p = load_params(tmp_path / "toy.yaml")
    folder = folders.new_folder(p.record, "articles")
    began = runner.first_manifest(folder.name, p, tmp_path / "toy.yaml", "migrate", True, (FIRST,))
    began = replace(began, pid=gone.pid)
    manifest.write(folder, began)
    finishing.note_run(p, began, "started")
    with psycopg.connect(database, application_name=f"runbook-runner {folder.name}"):
        finishing.settle_abandoned(p, True)
        assert manifest.read(folder).status == "running"
    wait_until(lambda: sessions(database, folder.name) == 0, 5)
    time.sleep(0.2)
    finishing.settle_abandoned(p, False)
    assert manifest.read(folder).status == "running"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-host")
        finishing.settle_abandoned(p, True)
        data = json.loads((folder / manifest.FILE).read_text())
        (folder / manifest.FILE).write_text(json.dumps(data | {"host": "another-host"}))
        finishing.settle_abandoned(p, True)
        assert manifest.read(folder).status == "running", "the ledger says that it began on the first"
        (folder / manifest.FILE).write_text(json.dumps(data))
    finishing.settle_abandoned(p, True)
    assert (manifest.read(folder).status, list(verify.check(p, folder.name).failed)) == ("interrupted", [])


def test_older_records_of_what_a_schedule_repeats_are_removed_where_the_parameters_say_so(tmp_path: Path) -> None:
    p = load_params(write_params(tmp_path, record={"runs_dir": str(tmp_path / "runs"), "keep": 2}))

    def recorded(n: int, name: str, status: str = "passed") -> manifest.Manifest:
        made = replace(
            make_manifest(
                run_id=f"run-{n}", started=f"2026-01-01T00:00:0{n}+00:00", status=status, target="articles"
            ),
            phases=(manifest.PhaseRun(name, status),),
        )
        (tmp_path / "runs" / made.run_id).mkdir(parents=True)
        manifest.write(tmp_path / "runs" / made.run_id, made)
        return made

    recorded(1, "operate/refresh", "failed")
    recorded(2, "operate/rebuild_index")
    made = [recorded(n, "operate/refresh") for n in range(3, 7)]
    (tmp_path / "runs" / "run-9").symlink_to(tmp_path / "runs" / "run-1")
    record.prune(p, made[-1])
    left = sorted(f.name for f in (tmp_path / "runs").glob("run-*"))
    assert left == ["run-1", "run-2", "run-5", "run-6", "run-9"], "those that passed, but the newest two"
    assert "run-3" not in (tmp_path / "runs" / "index.html").read_text()


def test_a_quiet_run_says_nothing_where_all_is_well(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = run()
    for quiet, said in ((True, ""), (False, f"✔ passed: {result.folder / 'index.html'}\n")):
        with pytest.raises(SystemExit) as ended:
            main._end(result, quiet)
        assert (ended.value.code, capsys.readouterr().out) == (0, said)
    with pytest.raises(SystemExit):
        main._end(replace(result, status="failed", exit_code=1, error="why"), True)
    both = capsys.readouterr()
    assert both.err == "why\n" and "failed" in both.out
