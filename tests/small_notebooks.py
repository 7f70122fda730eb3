"""Notebooks of three cells in the order of the real ones, for the tests of the runner."""

from __future__ import annotations

from pathlib import Path

import nbformat

from runbook_lib.core.registry import STEPS, UNDO, notebook

OPEN = """from runbook_lib.core.phase import open_phase
phase = open_phase("{name}", params_file, run_id, execute)
phase.ledger.create() if phase.execute else None"""
CLOSE = """from runbook_lib.core.gates import collect, gate
phase.require()
phase.close(phase.prove(lambda p: collect([gate("toy.is_done", True, p.name, found="done", needed="done")])))"""


def write(folder: Path, **bodies: str) -> Path:
    """Writes every notebook; ``p50_backfill="…"`` puts code between opening and closing."""
    for name in STEPS:
        body = bodies.get(f"p{name}", "'nothing special'") if name not in UNDO else "'back'"
        parameters = nbformat.v4.new_code_cell("params_file = ''\nrun_id = ''\nexecute = False")
        parameters.metadata["tags"] = ["parameters"]
        cells = [
            nbformat.v4.new_markdown_cell(f"# {name}"),
            parameters,
            *(nbformat.v4.new_code_cell(c) for c in (OPEN.format(name=name), body, CLOSE)),
        ]
        made = nbformat.v4.new_notebook(cells=cells)
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        (folder / notebook(name)).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(made, folder / notebook(name))
    return folder
