"""The kernel of the next notebook, started while a notebook runs: it has imported what its cells will import."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.log import logger

ENGINE = "runbook"
# The kernel writes its log to our standard error, a traceback when it is interrupted among it; that is not progress.
QUIET_KERNEL = "--log-level=CRITICAL"
# So that kernels that run at the same time do not wait for each other's history.
NO_HISTORY = "--HistoryManager.hist_file=:memory:"
IMPORTS = "--IPKernelApp.exec_lines="
# What the first %%sql cell of a notebook imports, which takes as long as all else.
OF_SQL_CELLS = "import sql.magic"
OF_FRAMES = "import pandas"


class Kernels:
    """A kernel for each of these notebooks, which are run in this order."""

    def __init__(self, notebooks: Sequence[Path]) -> None:
        self._following = dict(pairwise(notebooks))
        self._ready: dict[Path, AsyncKernelManager] = {}

    def take(self, notebook: Path) -> AsyncKernelManager:
        """The kernel of this notebook; starts that of the next one. Until it is handed over, :meth:`end` ends it."""
        for wanted in (notebook, self._following.get(notebook)):
            if wanted and wanted not in self._ready:
                self._ready[wanted] = _started(wanted)
        return self._ready.pop(notebook)

    def end(self) -> None:
        """Ends what was not taken."""
        while self._ready:
            _, kernel = self._ready.popitem()
            run_sync(kernel.shutdown_kernel)(now=True)


@contextmanager
def ahead(notebooks: Sequence[Path]) -> Iterator[Kernels]:
    """Kernels for the length of a block."""
    kernels = Kernels(notebooks)
    try:
        yield kernels
    finally:
        kernels.end()


def _started(notebook: Path) -> AsyncKernelManager:
    manager = AsyncKernelManager(kernel_name="python3")
    arguments = [QUIET_KERNEL, NO_HISTORY, IMPORTS + _imports(notebook)]
    run_sync(manager.start_kernel)(extra_arguments=arguments, cwd=str(notebook.parent))
    return manager


def _imports(notebook: Path) -> str:
    """Code that imports what the cells import; what cannot be imported is left for the cell to say."""
    lines = ["pass"]
    with suppress(OSError, ValueError):
        for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                lines += _imports_of("".join(cell["source"]))
    return "\n    ".join(["import contextlib\nwith contextlib.suppress(Exception):", *dict.fromkeys(lines)])


def _imports_of(source: str) -> list[str]:
    if source.startswith("%%sql"):
        return [OF_SQL_CELLS]
    frames = [OF_FRAMES] if ".to_frame(" in source else []
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return []
    return frames + [ast.unparse(s) for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]


class _Client(PapermillNotebookClient):  # type: ignore[misc]
    def papermill_execute_cells(self) -> None:
        """Executes the cells. A kernel in which all of them passed has closed its phase: nothing is left that it
        could end, and it need not be waited for, which takes as long as its start.
        """
        super().papermill_execute_cells()
        if not any(cell.metadata.get("papermill", {}).get("exception") for cell in self.nb.cells):
            self.shutdown_kernel = "immediate"


class _Engine(NBClientEngine):  # type: ignore[misc]
    """papermill's own, with a kernel that may be there already and is ended with the notebook."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, ahead: Kernels, notebook: Path, **_: Any
    ) -> Any:
        """Executes the cells; the kernel is ended, whatever happens."""
        kernel = ahead.take(notebook)
        return _Client(nb_man, km=kernel, log=logger, coalesce_streams=True).execute(cleanup_kc=True)


papermill_engines.register(ENGINE, _Engine)
