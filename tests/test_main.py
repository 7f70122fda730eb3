"""The command: exit codes, what stands on which stream, and help for a slip of the finger."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result

import runbook_lib
from runbook_lib.cli import embedded
from runbook_lib.cli.main import main
from runbook_lib.core.registry import NOTEBOOKS_ENV
from runbook_lib.core.target import load_params
from runbook_lib.runner import manifest, runner
from tests import small_notebooks
from tests.conftest import write_params

FIRST = "00_preflight"


@pytest.fixture
def runbook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Calls ``runbook`` with small notebooks in place of the real ones."""
    monkeypatch.setenv(NOTEBOOKS_ENV, str(small_notebooks.write(tmp_path / "nb")))
    return lambda *args: CliRunner().invoke(main, [str(a) for a in args])


def test_version_and_help(runbook: Callable[..., Result]) -> None:
    assert runbook("--version").stdout == f"runbook, version {runbook_lib.__version__}\n"
    for args in (["-h"], ["run", "--help"]):
        text = runbook(*args).stdout
        assert "3  waits for approval" in text


def test_a_mistyped_command_is_answered_with_the_nearest(runbook: Callable[..., Result]) -> None:
    result = runbook("stauts", "x.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no such command: stauts; did you mean status?" in result.stderr


def test_bad_parameters_exit_with_2_and_name_every_problem(runbook: Callable[..., Result], tmp_path: Path) -> None:
    path = write_params(tmp_path, vector={"dimention": 8}, index={"m": 1})
    for command in ("run", "check", "status"):
        result = runbook(command, path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "did you mean dimension?" in result.stderr and "index.m" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        ("status toi.yaml", "toy.yaml"),
        ("approve toy.yaml 90_cutover", "90_cut_over"),
        ("operate toy.yaml refesh", "refresh"),
        ("operate toy.yaml rebuild_indx --undo", "rebuild_index"),
        ("undo toy.yaml --to indx", "index"),
        ("run toy.yaml --to 70_tuen", "70_tune"),
        ("diff 20260102T030405Z-artikles x --runs-dir runs", "20260102T030405Z-articles"),
        ("status route.yaml", "hybrid"),
    ],
)
@pytest.mark.usefixtures("articles")
def test_a_mistyped_name_is_answered_with_the_nearest(
    runbook: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, meant: str
) -> None:
    write_params(tmp_path, cut_over={"route": "hybird"}).rename(tmp_path / "route.yaml")
    run = runner.first_manifest(
        "20260102T030405Z-articles", load_params(write_params(tmp_path)), tmp_path, "", False, ()
    )
    (tmp_path / "runs" / run.run_id).mkdir(parents=True)
    manifest.write(tmp_path / "runs" / run.run_id, run)
    monkeypatch.chdir(tmp_path)
    result = runbook(*command.split())
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.count(f"did you mean {meant}?") == 1


@pytest.mark.usefixtures("articles")
def test_check_starts_nothing(runbook: Callable[..., Result], tmp_path: Path) -> None:
    result = runbook("check", write_params(tmp_path))
    assert result.exit_code == 0, result.stderr
    assert "no obstacle to a run" in result.stdout
    assert "tried and rolled back: 10 kinds of statement; the table was locked for" in result.stdout
    assert "(SHARE ROW EXCLUSIVE, ACCESS EXCLUSIVE, SHARE UPDATE EXCLUSIVE)" in result.stdout
    unjudged = runbook("check", write_params(tmp_path, queries={"judgements": None}))
    assert unjudged.exit_code == 0 and "80_shadow will stop: without queries.judgements" in unjudged.stderr
    assert "80_shadow" not in result.stderr
    quiet = runbook("check", write_params(tmp_path, queries={"judgements": None}), "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, ""), "a schedule that says something sends a mail"
    bad = runbook("check", write_params(tmp_path, target={"key": "no_such_column"}))
    assert (bad.exit_code, "no_such_column" in bad.stderr) == (2, True), bad.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("articles")
def test_run_status_and_verify(runbook: Callable[..., Result], tmp_path: Path) -> None:
    path = write_params(tmp_path)
    before = json.loads(runbook("status", path, "--json").stdout)
    assert (before["ledger"], before["next"], before["route"]) == (False, FIRST, "legacy")

    result = runbook("run", path, "--execute", "--to", FIRST)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("✔ passed: ") and result.stdout.count("\n") == 1
    assert f"✔ {FIRST}" in result.stderr and "\x1b" not in result.stderr

    after = json.loads(runbook("status", path, "--json").stdout)
    run_id = after["phases"][0]["run_id"]
    assert (after["next"], after["phases"][0]["verdict"], after["last_run"]["status"]) == (
        "10_baseline", "PASS", "passed",
    )  # fmt: skip
    shown = runbook("status", path).stdout
    assert f"\nnext      runbook run {path} --execute\n" in shown and "\nreads     legacy\n" in shown
    assert f"\nrecord    passed, {os.path.relpath(tmp_path / 'runs' / run_id)}"[:70] in shown

    assert runbook("verify", path, run_id).exit_code == 0
    notebook = tmp_path / "runs" / run_id / f"{FIRST}.ipynb"
    written = notebook.read_text()
    notebook.write_text(written.replace("nothing special", "something special"))
    changed = runbook("verify", path, run_id)
    assert changed.exit_code == 1
    assert f"FAIL    record.notebook_is_unchanged   {run_id}/{FIRST}.ipynb\n  found   changed" in changed.stdout
    notebook.unlink()
    assert "found   missing" in runbook("verify", path, run_id).stdout
    notebook.write_text(written)
    (notebook.parent / "99_extra.ipynb").write_text("{}")
    assert "the ledger knows no such notebook" in runbook("verify", path, run_id).stdout

    unknown = runbook("verify", path, run_id.replace("T", "t"))
    assert unknown.exit_code == 2 and f"did you mean {run_id}?" in unknown.stderr


def test_verify_finds_a_changed_row_of_the_ledger(
    runbook: Callable[..., Result], tmp_path: Path, articles: psycopg.Connection[tuple[object, ...]]
) -> None:
    path = write_params(tmp_path)
    runbook("run", path, "--execute", "--to", FIRST)
    run_id = next(m.run_id for _, m in manifest.all_runs(tmp_path / "runs"))
    articles.execute("ALTER TABLE runbook.entry DISABLE TRIGGER ALL")
    articles.execute("""UPDATE runbook.entry SET body = '{"verdict": "FAIL"}' WHERE kind = 'phase'""")
    result = runbook("verify", path, run_id)
    assert result.exit_code == 1 and f"(phase of {FIRST}, run {run_id}) was changed" in result.stdout


def test_an_unexpected_error_is_a_crash_and_not_a_failed_gate(
    runbook: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(runner, "run", broken)
    result = runbook("run", "x.yaml")
    assert result.exit_code == 4 and "RuntimeError: broken" in result.stderr


def test_demo_stop_without_a_server(
    runbook: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runbook("demo", "--stop")
    assert (result.exit_code, result.stdout) == (0, "no demo server was running\n")


def test_sigterm_stops_the_embedded_server(tmp_path: Path) -> None:
    """The command is stopped while it loads; --stop afterwards finds nothing left."""
    code = (
        "import time; from runbook_lib.cli import demo, main\n"
        "def load(*a, **k): print('loading', flush=True); time.sleep(60)\n"
        "demo.load = load; main.main(['demo'])"
    )
    said = tmp_path / "said"
    with said.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout is not None and process.stdout.readline() == "loading\n", said.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 4
    assert not embedded.stop(tmp_path / "runs" / ".server" / "data")
