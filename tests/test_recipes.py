"""The recipes of docs/unattended.md do what they say: run as they are written, on paths of the test's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from runbook_lib.core.registry import MIGRATE, notebooks
from runbook_lib.runner.manifest import MEANINGS
from tests.conftest import DSN_ENV, write_params

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent
# All that cron gives a command on Debian.
CRONS_ENVIRONMENT = {"HOME": "/", "LOGNAME": "runbook", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def recipes(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "unattended.md").read_text("utf-8"), re.S)


def crontab() -> list[list[str]]:
    """The lines of the crontab: five fields and a command."""
    (text,) = recipes("cron")
    return [
        x.split(maxsplit=5) for x in text.splitlines() if x and not x.startswith("#") and not re.match(r"\w+=", x)
    ]


@pytest.fixture
def here(tmp_path: Path, database: str) -> Callable[[str], str]:
    """A command of the documents with paths of this test in the place of the documents'."""
    params = write_params(tmp_path)
    # The toy's model is a function of the tests.
    (tmp_path / "articles.env").write_text(f"export {DSN_ENV}='{database}' PYTHONPATH='{ROOT}'\n")
    places = {
        "/etc/runbook/articles.env": tmp_path / "articles.env",
        "/opt/runbook/params/articles.yaml": params,
        "params/articles.yaml": params,
        "/opt/runbook": ROOT,
        ".venv/bin/runbook": PROGRAMS / "runbook",
        "papermill ": f"{PROGRAMS / 'papermill'} ",
        "/tmp/30_expand_schema.ipynb": tmp_path / "out.ipynb",
    }

    def translated(command: str) -> str:
        for said, meant in places.items():
            command = command.replace(said, str(meant))
        return command

    return translated


def as_cron(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", command], env=CRONS_ENVIRONMENT, cwd="/", capture_output=True, text=True, timeout=200
    )


def test_crontab_lines_have_five_fields_and_no_per_cent_sign() -> None:
    assert len(crontab()) == 3
    for *fields, command in crontab():
        assert len(fields) == 5 and all(re.fullmatch(r"[\d*,/-]+", f) for f in fields)
        assert "%" not in command, "cron reads it as the end of the line"


@pytest.mark.usefixtures("articles")
def test_a_crontab_line_mails_nothing_when_all_is_well_and_the_reason_otherwise(
    here: Callable[[str], str], tmp_path: Path
) -> None:
    _, refresh, check = (here(command) for *_, command in crontab())
    well = as_cron(check)
    assert (well.returncode, well.stdout, well.stderr) == (0, "", "")
    failed = as_cron(refresh)
    assert failed.returncode == 1
    assert "phase.predecessor_passed" in failed.stderr and "run 50_backfill with execute: true first" in failed.stderr
    assert failed.stdout.startswith("✘ failed: ") and Path(failed.stdout.split(": ", 1)[1].strip()).is_file()
    (tmp_path / "articles.env").write_text("")
    unset = as_cron(check)
    assert (unset.returncode, unset.stdout) == (2, "") and f"environment variable {DSN_ENV}" in unset.stderr


@pytest.mark.usefixtures("articles")
def test_papermill_alone_exits_with_1_and_the_gates_message(here: Callable[[str], str], database: str) -> None:
    (command,) = (text for text in recipes("sh") if "papermill" in text)
    environment = os.environ | {DSN_ENV: database}
    done = subprocess.run(
        ["bash", "-ec", here(command)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1 and "FAIL    phase.predecessor_passed   20_extension" in done.stderr


@needs_systemd
def test_systemd_units_are_valid(tmp_path: Path) -> None:
    service, timer = recipes("ini")
    # The program and the user that the unit names are not on this machine.
    service = re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", service, flags=re.M)
    service = re.sub(r"^(User|WorkingDirectory)=.*\n", "", service, flags=re.M)
    for name, text in (("runbook-articles.service", service), ("runbook-articles.timer", timer)):
        (tmp_path / name).write_text(text)
    units = sorted(map(str, tmp_path.iterdir()))
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    ours = [line for line in checked.stderr.splitlines() if "runbook-articles" in line]
    assert ours == []


@needs_systemd
def test_the_timers_calendar_is_one() -> None:
    (calendar,) = re.findall(r"^OnCalendar=(.*)$", recipes("ini")[1], re.M)
    shown = subprocess.run(["systemd-analyze", "calendar", calendar], capture_output=True, text=True)
    assert shown.returncode == 0 and "Next elapse" in shown.stdout


class Fail(Exception):
    """Stands for AirflowFailException: no retry."""


class Retry(Exception):
    """Stands for AirflowException: the task's retries."""


class Sensor:
    """Stands for a task: its function, what it was given, and what follows it."""

    def __init__(self, function: Callable[..., Any], given: tuple[Any, ...], settings: dict[str, Any]) -> None:
        self.function, self.given, self.settings, self.following = function, given, settings, []  # type: ignore[var-annotated]

    def __rshift__(self, after: Sensor) -> None:
        self.following.append(after)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sensor]:
    """The tasks of the DAG, read with stand-ins for Airflow, on a project of the test's own."""
    made: list[Sensor] = []

    def sensor(**settings: Any) -> Callable[..., Any]:
        return lambda function: lambda *given: made.append(Sensor(function, given, settings)) or made[-1]

    class Dag:
        def __init__(self, name: str, **settings: Any) -> None:
            assert (name, settings["max_active_runs"]) == ("articles_to_pgvector", 1)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    sdk, exceptions = types.ModuleType("airflow.sdk"), types.ModuleType("airflow.sdk.exceptions")
    sdk.DAG, sdk.task = Dag, types.SimpleNamespace(sensor=sensor)  # type: ignore[attr-defined]
    exceptions.AirflowException, exceptions.AirflowFailException = Retry, Fail  # type: ignore[attr-defined]
    for name, module in {"airflow": types.ModuleType("airflow"), "airflow.sdk": sdk}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "airflow.sdk.exceptions", exceptions)
    (tmp_path / "notebooks").symlink_to(notebooks())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (dag,) = recipes("python")
    exec(compile(dag.replace("/opt/runbook", str(tmp_path)), "dag.py", "exec"), {})
    return made


def program(folder: Path, script: str) -> None:
    """A program in the place of ``runbook``."""
    path = folder / ".venv" / "bin" / "runbook"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_dag_has_a_task_for_each_phase_in_order(tasks: list[Sensor]) -> None:
    assert [task.settings["task_id"] for task in tasks] == list(MIGRATE)
    assert [task.following for task in tasks] == [[after] for after in tasks[1:]] + [[]]
    assert {task.settings["mode"] for task in tasks} == {"reschedule"}


def test_the_dag_tells_each_exit_code_apart(tasks: list[Sensor], tmp_path: Path) -> None:
    task = tasks[3]
    program(tmp_path, 'echo "$@" > called; exit $(cat code)')
    expected: dict[int, Any] = {0: True, 1: Fail, 2: Fail, 3: False, 4: Retry}
    assert expected.keys() == MEANINGS.keys()
    for code, wanted in expected.items():
        (tmp_path / "code").write_text(str(code))
        if isinstance(wanted, bool):
            assert task.function(*task.given) is wanted
        else:
            with pytest.raises(wanted, match=f"exit code {code}"):
                task.function(*task.given)
    assert (tmp_path / "called").read_text() == "run params/articles.yaml --execute --to 30_expand_schema\n"


def test_a_task_that_airflow_ends_lets_the_runbook_write_its_record(
    tasks: list[Sensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "trap 'echo whole > record; exit 4' TERM; touch begun; while :; do sleep 0.05; done")
    wait = subprocess.Popen.wait
    ended: list[bool] = []

    def ended_by_airflow(process: Any, *arguments: Any, **named: Any) -> int:
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        if not ended:
            ended.append(True)
            raise TimeoutError("ended by Airflow")
        return wait(process, *arguments, **named)

    monkeypatch.setattr(subprocess.Popen, "wait", ended_by_airflow)
    with pytest.raises(TimeoutError):
        tasks[0].function(*tasks[0].given)
    assert (tmp_path / "record").read_text() == "whole\n"


def test_the_pipelines_check_the_params_file() -> None:
    actions, gitlab = (yaml.safe_load(text) for text in recipes("yaml"))
    assert any("runbook check" in step.get("run", "") for step in actions["jobs"]["check"]["steps"])
    assert any("runbook check" in line for line in gitlab["runbook check"]["script"])
