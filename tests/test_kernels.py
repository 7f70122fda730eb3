"""The kernel of the next notebook is ready before its turn, and none is left over."""

from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import pytest

from runbook_lib.runner import kernels

SAYS_WHAT_IS_IMPORTED = "import sys\nprint('wave' in sys.modules)"


def notebook(folder: Path, name: str, *cells: str) -> Path:
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), path)
    return path


def executed(path: Path, ahead: kernels.Kernels) -> Any:
    given = {"engine_name": kernels.ENGINE, "kernel_name": "python3", "progress_bar": False}
    return papermill.execute_notebook(path, None, **given, ahead=ahead, notebook=path)


def test_a_kernel_has_imported_what_its_cells_import_and_stops_with_its_notebook(tmp_path: Path) -> None:
    broken = ("import no_such_module", "%%sql\nSELECT 1", "this is no Python")
    first = notebook(tmp_path, "first", SAYS_WHAT_IS_IMPORTED, "import wave")
    second, third = notebook(tmp_path, "second", "print(1)"), notebook(tmp_path, "third", *broken)
    before = set(psutil.Process().children(recursive=True))
    with kernels.ahead([first, second, third]) as ahead:
        assert executed(first, ahead).cells[0].outputs[0].text == "True\n"
        assert list(ahead._ready) == [second]
        assert executed(second, ahead).cells[0].outputs[0].text == "1\n"
        assert list(ahead._ready) == [third]
    assert not [p for p in set(psutil.Process().children(recursive=True)) - before if p.is_running()]


def test_a_kernel_that_was_started_is_ended_where_that_of_the_next_notebook_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = notebook(tmp_path, "first", "print(1)"), notebook(tmp_path, "second", "print(2)")
    before, start = set(psutil.Process().children(recursive=True)), kernels._started

    def none_for_the_second(path: Path) -> Any:
        if path == second:
            raise OSError("no process left")
        return start(path)

    monkeypatch.setattr(kernels, "_started", none_for_the_second)
    with pytest.raises(OSError, match="no process left"), kernels.ahead([first, second]) as ahead:
        ahead.take(first)
    assert not [p for p in set(psutil.Process().children(recursive=True)) - before if p.is_running()]


def test_a_notebook_that_cannot_be_read_is_for_papermill_to_name(tmp_path: Path) -> None:
    (tmp_path / "broken.ipynb").write_text("{")
    assert "pass" in kernels._imports(tmp_path / "broken.ipynb")
    assert "pass" in kernels._imports(tmp_path / "missing.ipynb")
