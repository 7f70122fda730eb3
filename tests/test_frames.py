"""What the notebooks say about DataFrames, tried where they say it: before the last cell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pandas
import psycopg
import pytest

from runbook_lib.core.gates import GateFailed
from runbook_lib.runner.target_status import ledger_rows
from tests.conftest import write_params
from tests.stepping import NOTEBOOKS, Stepped


def frames(stepped: Stepped) -> list[pandas.DataFrame]:
    """Those that the text above the last gates names."""
    read = nbformat.read(NOTEBOOKS / f"{stepped.notebook}.ipynb", as_version=4)
    text = next(c.source for c in read.cells if "## Must be true now" in c.source)
    return [eval(said, stepped.left) for said in re.findall(r"`([\w.]+\.to_frame\([^`]*\))`", text)]


@pytest.mark.usefixtures("articles")
def test_the_frames_that_a_notebook_names_are_there_in_a_plan_and_after_it_was_carried_out(tmp_path: Path) -> None:
    path = write_params(tmp_path)
    for name in ("migrate/00_preflight", "migrate/10_baseline", "migrate/20_extension"):
        for execute in (False, True):
            stepped = Stepped(name, path, execute=execute)
            for cell in stepped.cells[:-1]:
                stepped.run(cell)
            gates, all_gates, own = frames(stepped)
            assert gates["name"].tolist() == [g.name for g in stepped.left["gates"]]
            assert set(gates["name"]) <= set(all_gates["name"])
            assert len(own) or not execute, "what was carried out has left rows"
            stepped.run(stepped.cells[-1])
    assert set(ledger_rows(path)["kind"]) >= {"gate", "statement", "phase", "plan"}
    assert "figures.rows" not in ledger_rows(path, "statement") and len(ledger_rows(path, "statement"))
    systems = ledger_rows(path, "baseline", "systems")
    assert systems["name"].tolist() == ["legacy"] and systems["p50_ms"].dtype == "float64"


def test_the_gates_that_stopped_a_notebook_can_be_looked_at(
    tmp_path: Path, articles: psycopg.Connection[Any]
) -> None:
    stepped = Stepped("migrate/10_baseline", write_params(tmp_path))
    for section in ("Parameters", "Where am I"):
        stepped.section(section)
    with pytest.raises(GateFailed):
        stepped.section("Must be true first")
    found = stepped.phase.gates.to_frame()
    assert found.loc[found["verdict"] == "FAIL", "name"].tolist() == ["phase.predecessor_passed"]
    stepped.end()
