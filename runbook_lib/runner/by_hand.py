"""A run that somebody steps through in JupyterLab: working copies of the notebooks, and the record of what was done.

The notebooks of the project stay as they are. Each copy knows the parameters file and the run's id, so that all rows
that its cells write into the ledger are of one run; when JupyterLab has ended, the record is made from them.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat

from runbook_lib.core import db
from runbook_lib.core.gates import Verdict
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.registry import STEPS, current, notebook, notebooks
from runbook_lib.core.target import load_params
from runbook_lib.params import Params
from runbook_lib.runner import ending, finishing, folders, runner, selection, verify
from runbook_lib.runner import manifest as manifests
from runbook_lib.runner.manifest import BY_HAND, EXIT_CODES, Manifest, PhaseRun, Status
from runbook_lib.sql import load

SQL = load("runner")

START = "00_start"
CONFIG = ".jupyter"
CHECKPOINTS = ".ipynb_checkpoints"


def begin(params_file: str | Path) -> Path:
    """Makes the folder of a run by hand, with a working copy of every notebook; returns it.

    Raises BadInput for parameters or a server that cannot be worked with.
    """
    params = load_params(params_file)
    db.connect(params, "runbook lab").close()
    selection.check_stored(STEPS)
    folder = folders.new_folder(params.record, params.target.name, "by-hand")
    path = Path(params_file).resolve()
    manifests.write(folder, runner.first_manifest(folder.name, params, path, BY_HAND, True, ()))
    _copy(notebooks() / f"{START}.ipynb", folder, path)
    for name in STEPS:
        copy = folder / notebook(name)
        copy.parent.mkdir(exist_ok=True)
        _copy(notebooks() / notebook(name), copy.parent, path, folder.name)
    return folder


def _copy(source: Path, folder: Path, params_file: Path, run_id: str = "") -> None:
    """A notebook with these parameters in its own cell of parameters; execute stays False."""
    notebook = nbformat.read(source, as_version=4)  # type: ignore[no-untyped-call]
    cell = selection.parameters_cell(notebook)
    given = {"params_file": str(params_file)} | ({"run_id": run_id} if run_id else {})
    lines = [line for line in cell.source.splitlines() if line.split(" = ")[0] not in given]
    cell.source = "\n".join([*(f"{name} = {value!r}" for name, value in given.items()), *lines])
    nbformat.write(notebook, folder / source.name)  # type: ignore[no-untyped-call]


def finish(folder: Path, params: Params, run: Manifest, why: str = "") -> Manifest | None:
    """The record of what was carried out by hand, from the ledger and the copies; None where nothing was: then the
    copies are removed, and the folder, unless somebody has put files of their own into it.

    why: what else ended it than the person at the keyboard.
    """
    with db.connect(params, "runbook lab") as connection:
        entries = Ledger(connection, params, run.run_id, "").entries(run.run_id)
    # A rollback writes UNDONE in the name of the phases that it rolls back.
    rows = [e for e in entries if current(e["phase"]) in STEPS and e["body"].get("verdict") != "UNDONE"]
    if not rows:
        _remove_copies(folder)
        (folder / manifests.FILE).unlink(missing_ok=True)
        _remove_if_empty(folder)
        return None
    names = list(dict.fromkeys(e["phase"] for e in rows))
    done = tuple(_done(folder, run.run_id, name, [e for e in rows if e["phase"] == name]) for name in names)
    _remove_copies(folder)
    status = next((p.status for p in done if p.status is not Status.PASSED), Status.PASSED)
    run = replace(
        run,
        status=status,
        exit_code=EXIT_CODES[Status(status)],
        finished=manifests.now(),
        phases=done,
        notes=(*run.notes, *([why] if why else [])),
    )
    for phase in done:
        verify.note_notebook(params, run.run_id, phase, folder / f"{phase.file}.ipynb")
    return finishing.finish(folder, params, run)


def _remove_copies(folder: Path) -> None:
    """What ``begin`` and JupyterLab have put there, and no file of anybody else."""
    shutil.rmtree(folder / CONFIG, ignore_errors=True)
    copies = [folder / f"{START}.ipynb", *(folder / notebook(name) for name in STEPS)]
    for within in dict.fromkeys(copy.parent for copy in copies):
        # Through a link, files somewhere else would be removed.
        if within.is_symlink():
            continue
        for copy in copies:
            if copy.parent == within:
                copy.unlink(missing_ok=True)
        shutil.rmtree(within / CHECKPOINTS, ignore_errors=True)
        if within != folder:
            _remove_if_empty(within)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def settle(params: Params) -> list[str]:
    """Makes the records of runs by hand whose JupyterLab was killed, and which no session is left of; their ids.

    A manifest on disk proves nothing: no session is ended, and a run that the ledger knows otherwise is left alone.
    """
    settled = []
    for folder, run in manifests.abandoned(params.record.runs_dir, params.target.name):
        if run.way == BY_HAND and not _is_known_otherwise(params, run.run_id):
            finish(folder, params, run, "JupyterLab was killed; its end was found out by a later run")
            settled.append(run.run_id)
    return settled


def _is_known_otherwise(params: Params, run_id: str) -> bool:
    """Is it a run of the runner, or recorded already, or still at work?"""
    with db.connect(params, "runbook lab") as connection:
        entries = Ledger(connection, params, run_id, "").entries(run_id)
        connected = db.one(connection, SQL["sessions_of"], params, prefix=f"runbook {run_id} "[:63])["sessions"]
    return bool(connected) or any(e["kind"] in ("run", "record") for e in entries)


def _done(folder: Path, run_id: str, name: str, rows: list[dict[str, Any]]) -> PhaseRun:
    """How a notebook ended, by its newest verdict; its working copy becomes part of the record."""
    began, ended = rows[0]["written_at"], rows[-1]["written_at"]
    verdicts = [e["body"]["verdict"] for e in rows if e["kind"] == "phase"]
    ends: dict[str, tuple[Status, str]] = {
        Verdict.PASS: (Status.PASSED, ""),
        Verdict.FAIL: (Status.FAILED, "a gate did not pass"),
    }
    status, error = ends.get(verdicts[-1] if verdicts else "", (Status.INTERRUPTED, "it was not closed"))
    phase = PhaseRun(name, status, _second(began), round((ended - began).total_seconds(), 3), error)
    copy, kept = folder / notebook(name), folder / f"{phase.file}.ipynb"
    if copy.is_file() and not copy.is_symlink():
        copy.replace(kept)
    return replace(phase, sha256=ending.tell_the_truth(kept, phase, run_id))


def _second(at: datetime) -> str:
    return at.isoformat(timespec="seconds")


def root(folder: Path) -> Path:
    """What JupyterLab shows: the project where the run is in it, so that documents and parameters are in reach; else
    the folder of all runs.
    """
    project = notebooks().parent.resolve()
    return project if folder.is_relative_to(project) else folder.parent


def environment(folder: Path) -> dict[str, str]:
    """For a JupyterLab that saves within seconds what a cell has shown, asks about no news, and opens no tab of an
    earlier run, whose copies are gone.
    """
    config = folder / CONFIG / "labconfig"
    config.mkdir(parents=True, exist_ok=True)
    (config / "default_setting_overrides.json").write_text(
        '{"@jupyterlab/docmanager-extension:plugin": {"autosaveInterval": 5},'
        ' "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}\n'
    )
    paths = [str(config.parent), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    own = {"JUPYTERLAB_WORKSPACES_DIR": str(folder / CONFIG / "workspaces")}
    return os.environ | own | {"JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, paths))}
