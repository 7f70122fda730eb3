"""A server that a drill may crash, and the table of what was broken."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runbook_lib.cli import embedded
from tests.conftest import DSN_ENV
from tests.drills import kit, real_runs


@pytest.fixture(scope="session")
def breakable() -> Iterator[str]:
    """DSN of a server whose backends may be killed."""
    folder = Path(tempfile.mkdtemp(prefix="runbook-drill-"))
    try:
        with embedded.running(folder / "data") as dsn:
            yield dsn
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def templates(breakable: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The name of a database in which everything before a step has passed; made when it is asked for."""
    made: dict[str, str] = {}

    def ready(step: str) -> str:
        if step not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(DSN_ENV, "")
                made[step] = real_runs.make_template(breakable, tmp_path_factory.mktemp(step), step)
        return made[step]

    return ready


def pytest_report_header() -> str:
    return f"drills: {'20 moments each' if kit.FULL else 'a few moments each'}, RUNBOOK_DRILL_SEED={kit.SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if kit.FULL and kit.BROKEN:
        terminalreporter.section("what was broken, how often, what was lost")
        for line in kit.table():
            terminalreporter.write_line(line)
