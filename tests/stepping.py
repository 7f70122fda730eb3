"""Steps through the notebooks in this process: every cell, as somebody in JupyterLab would, without a kernel each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat

from runbook_lib import sqlmagic
from runbook_lib.phase import Phase

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def step(notebook: str, params_file: Path, *, execute: bool = True) -> dict[str, Any]:
    """Carries out one notebook, for instance ``migrate/00_preflight``; returns the variables that its cells left."""
    cells = [c for c in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells if c.cell_type == "code"]
    left: dict[str, Any] = {"display": str}
    try:
        for cell in cells:
            if cell.source.startswith("%%sql"):
                _read(left["phase"], cell.source.removeprefix("%%sql"))
                continue
            exec(compile(cell.source, f"{notebook}.ipynb", "exec"), left)
            if "parameters" in cell.metadata.get("tags", []):
                left |= {"params_file": str(params_file), "run_id": "step", "execute": execute}
    finally:
        if phase := left.get("phase"):
            phase.connection.close()
            phase.ledger.connection.close()
    return left


def step_all(way: str, names: Iterable[str], params_file: Path, *, execute: bool = True) -> None:
    """Carries out notebooks of one folder in order; stops at the first that raises."""
    for name in names:
        step(f"{way}/{name}", params_file, execute=execute)


def _read(phase: Phase, query: str) -> None:
    """A %%sql cell, on the read-only connection that it has in a notebook."""
    with sqlmagic._display_connection(phase) as connection:
        connection.execute(query)  # type: ignore[call-overload]
