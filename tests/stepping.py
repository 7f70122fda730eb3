"""Steps through the notebooks in this process: every cell, as somebody in JupyterLab would, without a kernel each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest

from runbook_lib.core import kernel, sqlmagic
from runbook_lib.core.phase import Phase

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


class Cell(NamedTuple):
    """A code cell, and the section of the notebook that it is in."""

    section: str
    source: str
    takes_parameters: bool


def cells(notebook: str) -> list[Cell]:
    """The code cells of a notebook, for instance ``migrate/00_preflight``."""
    section, found = "", []
    for cell in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells:
        if cell.cell_type == "markdown":
            section = (re.findall(r"^## (.*)$", cell.source, re.M) or [section])[-1]
        elif cell.cell_type == "code":
            found.append(Cell(section, cell.source, "parameters" in cell.metadata.get("tags", [])))
    return found


class Stepped:
    """A notebook that somebody steps through: its cells, in any order, on the variables that they leave."""

    def __init__(self, notebook: str, params_file: Path, *, execute: bool = True) -> None:
        self.notebook, self.cells = notebook, cells(notebook)
        self.left: dict[str, Any] = {"display": str}
        self._given = {"params_file": str(params_file), "run_id": "step", "execute": execute}

    @property
    def phase(self) -> Phase:
        phase: Phase = self.left["phase"]
        return phase

    def run(self, cell: Cell) -> None:
        """Runs one cell; what it raises, rises."""
        if cell.source.startswith("%%sql"):
            _read(self.phase, cell.source.removeprefix("%%sql"))
            return
        exec(compile(cell.source, f"{self.notebook}.ipynb", "exec"), self.left)
        if cell.takes_parameters:
            self.left |= self._given

    def section(self, title: str) -> None:
        """Runs the cells of one section."""
        for cell in self.cells:
            if cell.section.startswith(title):
                self.run(cell)

    def end(self) -> None:
        """Closes the connections, wherever the cells have come."""
        if phase := self.left.get("phase"):
            phase.end("was ended by the test", "nothing")


def step(notebook: str, params_file: Path, *, execute: bool = True, times: int = 1) -> dict[str, Any]:
    """Carries out one notebook; returns the variables that its cells left. times: how often each cell is run."""
    stepped = Stepped(notebook, params_file, execute=execute)
    try:
        for cell in stepped.cells:
            for _ in range(times if cell is not stepped.cells[-1] else 1):
                stepped.run(cell)
    finally:
        stepped.end()
    return stepped.left


def step_all(way: str, names: Iterable[str], params_file: Path, *, execute: bool = True, times: int = 1) -> None:
    """Carries out notebooks of one folder in order; stops at the first that raises."""
    for name in names:
        step(name if "/" in name else f"{way}/{name}", params_file, execute=execute, times=times)


def told_in_a_plan(notebook: str, params_file: Path) -> tuple[set[str], list[tuple[str, str]]]:
    """The verdicts of the way to a step's work, and verdict and finding of each gate of its proof, by a plan."""
    left = step(notebook, params_file, execute=False)
    proof = [(str(g.verdict), g.found) for g in left["gates"]]
    return {str(g.verdict) for g in left["phase"].gates if g not in left["gates"].gates}, proof


def assert_planned(notebook: str, params_file: Path) -> None:
    """The plan of a rollback whose operation was carried out: it may begin, and what it proves is not claimed yet."""
    way_here, proof = told_in_a_plan(notebook, params_file)
    assert way_here == {"WOULD PASS"}, "the operation is there, and nothing later relies on it"
    assert proof and {verdict for verdict, _ in proof} == {"NOT RUN"}
    ahead = re.compile(rf"known only after {notebook}, which has \d+ statements? to run$")
    assert all(ahead.search(found) for _, found in proof), proof


@contextmanager
def in_another_kernel() -> Iterator[None]:
    """What is opened within does not end what is open outside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_held", [])
        yield


def _read(phase: Phase, query: str) -> None:
    """A %%sql cell, on the read-only connection that it has in a notebook."""
    with sqlmagic.display_connection(phase.params, phase.run_id) as connection:
        connection.execute(query)  # type: ignore[call-overload]
