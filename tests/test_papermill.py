"""A notebook through plain papermill, as a scheduler without our command runs it: every gate stands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import nbformat
import psycopg
import pytest

from runbook_lib.core import opening
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import expand_schema, extension

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "migrate" / "30_expand_schema.ipynb"

Papermill = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def papermill(tmp_path: Path) -> Papermill:
    """Runs the notebook with ``-p`` for each keyword, all of them as text; the executed one is ``out.ipynb``."""

    def run(**parameters: str) -> subprocess.CompletedProcess[str]:
        given = [part for name, value in parameters.items() for part in ("-p", name, value)]
        command = [sys.executable, "-m", "papermill", NOTEBOOK, tmp_path / "out.ipynb", *given]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)

    return run


def columns(connection: psycopg.Connection[Any]) -> list[str]:
    query = "SELECT attname FROM pg_attribute WHERE attrelid = 'articles'::regclass AND attnum > 0 ORDER BY attnum"
    return [name for (name,) in connection.execute(query)]


def test_a_phase_before_its_predecessor_fails_on_the_gate_and_passes_after_it(
    papermill: Papermill,
    tmp_path: Path,
    articles: psycopg.Connection[Any],
    open_phase: Callable[..., Phase],
) -> None:
    phase = open_phase("20_extension")
    expand_schema.record_start(phase)
    before = columns(articles)
    given = {"params_file": str(tmp_path / "toy.yaml"), "execute": "true"}

    refused = papermill(**given)
    assert refused.returncode == 1
    assert "GateFailed" in refused.stderr and "FAIL    phase.predecessor_passed   20_extension" in refused.stderr
    assert columns(articles) == before, "nothing was changed"

    extension.apply(phase)
    phase.close(phase.prove(extension.verify))
    passed = papermill(**given)
    assert passed.returncode == 0, passed.stderr[-3000:]
    assert "embedding" in columns(articles)
    last = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1]
    assert "30_expand_schema  PASS     40_load_embeddings" in last.outputs[0]["data"]["text/plain"]


def test_a_mistyped_switch_is_refused(papermill: Papermill, tmp_path: Path, open_phase: Callable[..., Phase]) -> None:
    open_phase("20_extension")
    refused = papermill(params_file=str(tmp_path / "toy.yaml"), execute="yes")
    assert refused.returncode == 1 and "pass execute: true or execute: false" in refused.stderr


def test_a_mistyped_parameter_is_refused_with_the_nearest_name(
    papermill: Papermill, tmp_path: Path, open_phase: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    open_phase("20_extension")
    before = columns(articles)
    refused = papermill(param_file=str(tmp_path / "toy.yaml"), execute="true")
    assert refused.returncode == 1
    assert "FAIL    params.notebook_has_it   param_file" in refused.stderr
    assert "do      did you mean params_file?" in refused.stderr
    assert columns(articles) == before


def test_a_parameter_that_somebody_added_to_the_notebook_is_none_that_is_mistyped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Shell:
        user_ns: ClassVar[dict[str, list[str]]] = {
            "In": ["", "params_file = 'a'\nk = 7", "x = (", "# Parameters\nk = 9\nkk = 1\n"]
        }

    monkeypatch.setattr(opening, "get_ipython", Shell)
    monkeypatch.setattr(opening, "PARAMETERS", ("run_id",))
    assert opening._unknown_parameters() == (["kk"], ["run_id", "params_file", "k"])
