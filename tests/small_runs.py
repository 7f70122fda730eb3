"""Runs of small notebooks, and what they left: for the tests of how a run may end."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.core.registry import NOTEBOOKS_ENV
from runbook_lib.runner import manifest, runner
from runbook_lib.runner.manifest import Manifest
from runbook_lib.runner.runner import RunResult
from tests import small_notebooks
from tests.conftest import write_params

FIRST, SECOND = "00_preflight", "10_baseline"
ROOT = Path(__file__).parent.parent

GATE = """from runbook_lib.core.gates import gate, collect
phase._judge(collect([gate("toy.fact_holds", False, "articles", found="this", needed="that", do="do")]))"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunResult, list[str]]]:
    """Runs small notebooks on the toy table; returns the result and the lines said.

    ``sections`` replaces keys of the parameters; other keyword arguments are the runner's.
    """

    def go(
        bodies: dict[str, str] | None = None, sections: dict[str, Any] | None = None, **options: Any
    ) -> tuple[RunResult, list[str]]:
        folder = small_notebooks.write(tmp_path / "note{books}", **(bodies or {}))
        monkeypatch.setenv(NOTEBOOKS_ENV, str(folder))
        said: list[str] = []
        options = {"execute": True, "last": FIRST} | options
        return runner.run(write_params(tmp_path, **(sections or {})), say=said.append, **options), said

    return go


def record_of(result: RunResult) -> Manifest:
    """The manifest of a run, whose page is there, whose files are whole, and which its owner alone may read."""
    assert result.folder is not None
    assert {"index.html", "manifest.json"} <= {p.name for p in result.folder.iterdir()}
    assert not list(result.folder.glob("*.unfinished"))
    # What papermill writes is as the umask says, until the end; in this folder nobody else can open it.
    ours = [p for p in result.folder.iterdir() if p.suffix != ".ipynb"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in ours} == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in (result.folder, result.folder.parent)} == {0o700}
    return manifest.read(result.folder)


def ledger_rows(dsn: str, kind: str) -> list[tuple[Any, ...]]:
    """Phase and body of every row of a kind, in order."""
    with psycopg.connect(dsn) as connection:
        return connection.execute(
            "SELECT phase, body FROM runbook.entry WHERE kind = %s ORDER BY seq", [kind]
        ).fetchall()


def sessions(dsn: str, run_id: str = "") -> int:
    """How many sessions of a run, or of any, the server has."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE starts_with(application_name, %s)", [f"runbook {run_id}"]
        ).fetchone()
        assert row is not None
        return int(row[0])


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Fails where it does not hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)
