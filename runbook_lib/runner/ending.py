"""How a notebook ended, told by what it raised and by the ledger, never by papermill's own metadata.

That calls cells completed that never ran, and a notebook that left by ``sys.exit(0)`` a success.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import psycopg
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from runbook_lib.core import db
from runbook_lib.core.cell_order import OutOfOrder
from runbook_lib.core.gates import BadInput, GateFailed, LockNotObtained, NotApproved, OutsideWindow, Verdict
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.redaction import redacted
from runbook_lib.params import Params
from runbook_lib.runner import manifest as manifests
from runbook_lib.runner.manifest import PhaseRun, Status

LONGEST_ERROR = 2000

# What a notebook raised, and how that phase ended. Everything else is a crash.
ENDS = {
    GateFailed.__name__: Status.FAILED,
    BadInput.__name__: Status.FAILED,
    LockNotObtained.__name__: Status.FAILED,
    OutOfOrder.__name__: Status.FAILED,
    NotApproved.__name__: Status.WAITING,
    OutsideWindow.__name__: Status.WAITING,
    "KeyboardInterrupt": Status.INTERRUPTED,
}


class Outcome(NamedTuple):
    """How one notebook ended. raised: name of the exception, empty where there was none."""

    status: Status
    error: str = ""
    raised: str = ""


def of_error(error: Exception) -> Outcome:
    """The end of a notebook whose execution raised this."""
    if isinstance(error, PapermillExecutionError):
        status = ENDS.get(error.ename, Status.CRASHED)
        if error.ename == BadInput.__name__ and db.REACHABLE in str(error.evalue):
            status = Status.CRASHED  # the runner had reached this server before it began the notebook
        text = f"{error.ename}: {error.evalue}" if status is Status.CRASHED else str(error.evalue).strip("\n")
        return Outcome(status, _bounded(text), error.ename)
    if isinstance(error, DeadKernelError):
        return Outcome(Status.CRASHED, "the kernel died: killed, or out of memory", "DeadKernelError")
    if isinstance(error, CellTimeoutError):
        return Outcome(Status.CRASHED, _bounded(f"a cell ran out of its time: {error}"), "CellTimeoutError")
    # Whatever papermill, nbclient or the disk raise: the run ends here, and its record has to say so.
    return Outcome(Status.CRASHED, _bounded(f"{type(error).__name__}: {error}"), type(error).__name__)


def _bounded(text: str) -> str:
    """Redacted before it is cut: half a secret would be recognised by nobody."""
    return str(redacted(text))[:LONGEST_ERROR]


def of_plan(executed: Any) -> Outcome:
    """The end of a notebook that only printed: planned, if every cell was run."""
    if all(_was_run(c) for c in executed.cells if c.cell_type == "code" and c.source.strip()):
        return Outcome(Status.PLANNED)
    return Outcome(Status.CRASHED, "the notebook stopped before its last cell, without an error (sys.exit?)")


def by_the_ledger(params: Params, run_id: str, phase: str) -> Outcome:
    """The end of a notebook that raised nothing: passed, if it left that verdict in the ledger."""
    try:
        with db.connect(params, "runbook-runner") as connection:
            entries = Ledger(connection, params, run_id, phase).entries(run_id)
    except (BadInput, psycopg.Error) as error:
        return Outcome(Status.CRASHED, f"the ledger could not be read: {' '.join(str(error).split())}")
    verdicts = [e["body"]["verdict"] for e in entries if e["kind"] == "phase" and e["phase"] == phase]
    if verdicts and verdicts[-1] == Verdict.PASS:
        return Outcome(Status.PASSED)
    found = f"its newest verdict is {verdicts[-1]}" if verdicts else "it wrote no verdict"
    return Outcome(Status.CRASHED, f"the notebook ended without an error, but by the ledger {found} (sys.exit?)")


def _was_run(cell: Any) -> bool:
    started = cell.metadata.get("papermill", {}).get("start_time")
    return bool(started) and not any(o.output_type == "error" for o in cell.outputs)


def tell_the_truth(path: Path, phase: PhaseRun, run_id: str) -> str:
    """Rewrites an executed notebook atomically, its cells' states as they were; returns its SHA-256.

    Empty where there is no notebook or only half of one: papermill's saves are not atomic.
    """
    try:
        notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    except (OSError, ValueError):
        return ""
    started = [c for c in notebook.cells if c.metadata.get("papermill", {}).get("start_time")]
    for cell in notebook.cells:
        mark = cell.metadata.get("papermill")
        if mark is None:
            continue
        if any(o.output_type == "error" for o in cell.get("outputs", [])):
            mark["status"] = "failed"
        elif cell not in started:
            mark["status"] = "pending"
        elif cell is started[-1] and phase.status in (Status.INTERRUPTED, Status.CRASHED):
            mark["status"] = "interrupted"
        else:
            mark["status"] = "completed"
    notebook.metadata["runbook"] = {"status": str(phase.status), "run_id": run_id, "phase": phase.name}
    told = nbformat.from_dict(redacted(notebook))  # type: ignore[no-untyped-call]
    content = nbformat.writes(told)  # type: ignore[no-untyped-call]
    manifests.write_atomically(path, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()
