"""The Tab key: what it completes, in which words help lists the same, and that it answers at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from runbook_lib.cli.main import main
from runbook_lib.core.registry import MIGRATE, OPERATE, UNDO, short


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params").mkdir()
    for name in ("params/articles.yaml", "params/notes.yml", "docker-compose.yml", "runs/2026-a/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)


def completed(line: str) -> list[str]:
    *arguments, incomplete = line.split(" ")
    return [c.value for c in BashComplete(main, {}, "runbook", "_C").get_completions(arguments, incomplete)]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("sta", ["status"]),
        ("status ", ["params/articles.yaml", "params/notes.yml"]),
        ("status params/n", ["params/notes.yml"]),
        ("run params/articles.yaml --to ", list(MIGRATE)),
        ("run params/articles.yaml --from 5", ["50_backfill"]),
        ("undo params/articles.yaml --to ", [short(name) for name in UNDO]),
        ("operate params/articles.yaml ", [short(name) for name in OPERATE]),
        (
            "operate params/articles.yaml re",
            ["rehearse", "refresh", "rebuild_index", "retire_model", "retire_legacy"],
        ),
        ("operate --undo params/articles.yaml re", ["rebuild_index", "retire_legacy"]),
        ("approve params/articles.yaml 9", ["90_cut_over"]),
        ("verify params/articles.yaml ", ["2026-a"]),
        ("diff 2026-a ", ["2026-a"]),
    ],
)
def test_tab_completes(line: str, values: list[str]) -> None:
    assert completed(line) == values


def test_a_params_file_elsewhere_is_left_to_the_shell() -> None:
    (item,) = BashComplete(main, {}, "runbook", "_C").get_completions(["run"], "/etc/")
    assert (item.value, item.type) == ("/etc/", "file")


def test_help_lists_phases_operations_and_rollbacks() -> None:
    text = CliRunner().invoke(main, ["--help"]).stdout
    assert all(short(name) in text for name in (*MIGRATE, *OPERATE))
    assert "..." not in text.partition("Commands:")[2].partition("Phases:")[0], "no command's help is cut off"
    for command, names in (("run", MIGRATE), ("undo", UNDO), ("operate", OPERATE)):
        text = CliRunner().invoke(main, [command, "--help"]).stdout
        assert all(f"\n    {short(name)} " in text for name in names), command


@pytest.mark.parametrize("command", sorted(main.commands))
def test_help_fits_a_terminal(command: str) -> None:
    lines = CliRunner().invoke(main, [command, "--help"], prog_name="runbook").stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_each_shell_is_valid_there(shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    command = [sys.executable, "-c", "from runbook_lib.cli.main import main; main(prog_name='runbook')"]
    environment = os.environ | {"_RUNBOOK_COMPLETE": f"{shell}_source"}
    script = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "_runbook_completion" in script
    checked = subprocess.run([program, "-n"], input=script, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_neither_help_nor_tab_imports_what_the_work_needs() -> None:
    """A shell starts the command anew for each press of the key."""
    heavy = {"IPython", "papermill", "nbformat", "pydantic", "numpy", "matplotlib", "pgvector"}
    code = f"import sys, runbook_lib.cli.main; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
