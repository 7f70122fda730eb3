"""JupyterLab under test: opening notebooks, editing and running cells, and reading what they show."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.browser import Browser, wait_for

PANEL = "jupyterapp.shell.currentWidget"
KERNEL = f"{PANEL}.sessionContext.session?.kernel"
# Answers only once the notebook's own cells stand on the page and its kernel answers.
READY = f"{PANEL}?.context?.isReady && {KERNEL}?.status === 'idle'"
CELLS = f"""{PANEL}.content.model.cells"""
SHOWN = f"""Array.from({{length: {CELLS}.length}}, (_, i) => {CELLS}.get(i)).map(c => ({{
    kind: c.type, source: c.sharedModel.getSource(), count: c.executionCount ?? null,
    outputs: c.type === 'code' ? c.outputs.toJSON() : []}}))"""

CONFIGURATION = """
c.ServerApp.open_browser = False
c.ServerApp.token = ''
c.ServerApp.port = {port}
c.ServerApp.port_retries = 0
c.LabApp.expose_app_in_browser = True
"""


@dataclass(frozen=True)
class Cell:
    """One cell as the notebook in the browser holds it."""

    kind: str
    source: str
    count: int | None
    outputs: list[dict[str, Any]]

    @property
    def text(self) -> str:
        """What its outputs say, as text."""
        parts = [o.get("text") or o.get("data", {}).get("text/plain") or o.get("evalue") or "" for o in self.outputs]
        return "\n".join("".join(p) for p in parts)

    @property
    def error(self) -> str:
        """Name of the exception that it ended with; empty where there was none."""
        return next((str(o["ename"]) for o in self.outputs if o["output_type"] == "error"), "")


class Lab:
    """JupyterLab in a page."""

    def __init__(self, page: Browser, url: str) -> None:
        self.page = page
        page.open(f"{url}/lab")
        page.wait("window.jupyterapp !== undefined && document.querySelector('#jp-main-dock-panel') !== null")
        page.run("jupyterapp.restored.then(() => true)")

    def command(self, name: str, wait: bool = True, **arguments: Any) -> None:
        """A command of JupyterLab's menus."""
        call = f"jupyterapp.commands.execute({json.dumps(name)}, {json.dumps(arguments)})"
        self.page.run(f"{call}.then(() => true)" if wait else f"void {call}")

    def open(self, path: str, seconds: float = 60) -> None:
        """Opens a notebook by its path below the server's folder and waits for its kernel."""
        self.command("docmanager:open", path=path)
        self.page.wait(READY, seconds)

    def select(self, name: str) -> None:
        """Brings an open notebook to the front."""
        main = "Array.from(jupyterapp.shell.widgets('main'))"
        self.page.run(f"jupyterapp.shell.activateById({main}.find(w => w.title.label === '{name}.ipynb').id)")
        self.page.wait(f"{PANEL}?.title.label === '{name}.ipynb'")

    def edit(self, old: str, new: str) -> None:
        """Changes text in the one cell that holds it."""
        which = next(i for i, c in enumerate(self.cells()) if c.kind == "code" and old in c.source)
        source = self.cells()[which].source.replace(old, new)
        self.page.run(f"{CELLS}.get({which}).sharedModel.setSource({json.dumps(source)})")

    def run_all(self, seconds: float = 60) -> list[Cell]:
        """Runs every cell, as the menu does, and waits until the kernel rests."""
        self.start_all()
        self.rest(seconds)
        return self.cells()

    def start_all(self) -> None:
        self.command("notebook:run-all-cells", wait=False)
        self.page.wait(f"{KERNEL}?.status === 'busy'")

    def rest(self, seconds: float = 60) -> None:
        """Waits until nothing runs and nothing is queued."""
        busy = f"{PANEL}.content.widgets.some(w => w.model.executionState === 'running')"
        self.page.wait(f"{KERNEL}?.status === 'idle' && !({busy})", seconds)

    def cells(self) -> list[Cell]:
        return [Cell(**c) for c in self.page.run(SHOWN)]

    def code(self, part: str) -> Cell:
        """The code cell that holds this text."""
        return next(c for c in self.cells() if c.kind == "code" and part in c.source)

    def show(self, part: str) -> None:
        """Scrolls to the code cell that holds this text."""
        which = next(i for i, c in enumerate(self.cells()) if c.kind == "code" and part in c.source)
        self.page.run(
            f"{PANEL}.content.activeCellIndex = {which},"
            f" {PANEL}.content.scrollToItem({which}, 'start').then(() => true)"
        )

    def close(self) -> None:
        """Saves, ends the kernel and closes the tab, without the question whether one is sure."""
        self.page.run(f"{PANEL}.context.save().then(() => true)")
        self.page.run(f"{PANEL}.sessionContext.shutdown().then(() => true)")
        self.page.run(f"{PANEL}.close(), true")


def configure(folder: Path, port: int) -> dict[str, str]:
    """Environment for a JupyterLab that opens no browser, asks for no token, and lets its page be driven."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jupyter_server_config.py").write_text(CONFIGURATION.format(port=port))
    (folder / "labconfig").mkdir(exist_ok=True)
    off = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (folder / "labconfig" / "page_config.json").write_text(json.dumps(off))
    own = {name: str(folder) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    return {**os.environ, **own, "IPYTHONDIR": str(folder / "ipython")}


@contextlib.contextmanager
def jupyterlab(notebooks: Path, folder: Path, port: int) -> Iterator[str]:
    """JupyterLab on these notebooks, ended with its kernels afterwards; yields its address."""
    command = [sys.executable, "-m", "jupyterlab", str(notebooks), "--allow-root"]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=configure(folder / "jupyter", port), stdout=log, stderr=log)
        try:
            yield ready(f"http://localhost:{port}", server)
        finally:
            server.terminate()
            server.wait(30)


def ready(url: str, process: subprocess.Popen[Any], seconds: float = 60) -> str:
    """The address, as soon as JupyterLab answers there."""

    def look() -> str:
        with urllib.request.urlopen(f"{url}/api/status", timeout=5):
            return url

    return wait_for(look, process, seconds)
