"""Runs the notebooks in order through papermill, and tells the truth about how it ended.

papermill's own metadata calls cells completed that never ran, and a notebook that left by ``sys.exit(0)`` a
success. So a phase has passed here only if the ledger holds its verdict; everything else is read from what was
raised.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import nbformat
import papermill
import psycopg
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

import runbook_lib
from runbook_lib import db
from runbook_lib import manifest as manifests
from runbook_lib import params as params_module
from runbook_lib.display import duration
from runbook_lib.gates import BadInput, Gate, GateFailed, LockNotObtained, NotApproved, Verdict
from runbook_lib.inputs import input_problems
from runbook_lib.ledger import Ledger
from runbook_lib.manifest import BAD_INPUT, EXIT_CODES, SYMBOLS, Manifest, PhaseRun, Status
from runbook_lib.params import Params
from runbook_lib.phase import MIGRATE, UNDO
from runbook_lib.sql import load

SQL = load("runner")
ORDERS = {"migrate": MIGRATE, "undo": tuple(UNDO)}
NOTEBOOKS_ENV = "RUNBOOK_NOTEBOOKS"

# A cancelled statement that has not stopped by then loses its session: nothing may go on without its runner.
GRACE_S = 1.0
LONGEST_ERROR = 2000

# The kernel writes its log to our standard error, a traceback when it is interrupted among it; that is not progress.
QUIET_KERNEL = "--log-level=CRITICAL"

# What a notebook raised, and how that phase ended. Everything else is a crash.
ENDS = {
    GateFailed.__name__: Status.FAILED,
    BadInput.__name__: Status.FAILED,
    LockNotObtained.__name__: Status.FAILED,
    NotApproved.__name__: Status.WAITING,
    "KeyboardInterrupt": Status.INTERRUPTED,
}

logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it would say, the record says better


@dataclass(frozen=True)
class RunResult:
    """How a run ended. folder: its record; None where nothing was left to do."""

    status: Status
    exit_code: int
    folder: Path | None


class Outcome(NamedTuple):
    """How one notebook ended. raised: name of the exception, empty where there was none."""

    status: Status
    error: str = ""
    raised: str = ""


def notebooks() -> Path:
    """The folder of the notebooks: beside the package, or where RUNBOOK_NOTEBOOKS points."""
    elsewhere = os.environ.get(NOTEBOOKS_ENV)
    return Path(elsewhere) if elsewhere else Path(runbook_lib.__file__).parent.parent / "notebooks"


def run(
    params_file: str | Path,
    *,
    execute: bool,
    first: str | None = None,
    last: str | None = None,
    way: str = "migrate",
    say: Callable[[str], None] | None = None,
) -> RunResult:
    """Runs phases ``first`` to ``last`` of ``migrate`` or ``undo``, stopping at the first that does not pass.

    With ``execute`` and no ``first``, a migration goes on where the ledger says that it stands; phases proved
    before are not run again. ``say`` gets the progress, a line a phase; standard error if not given.
    Raises BadInput, before anything was started and without a record, for parameters that cannot be worked with.
    """
    say = say or _to_standard_error
    params = params_module.load(params_file)
    _check(params, way, first, last)
    chosen = _chosen(params, way, first, last, execute, say)
    runs_dir = params.record.runs_dir
    if not chosen:
        return RunResult(Status.PASSED, EXIT_CODES[Status.PASSED], None)
    settle_abandoned(params)
    folder = _new_folder(runs_dir, params.target.name)
    with _stopped_by_signals(params, folder.name) as stop:
        manifest = _first_manifest(folder.name, params, Path(params_file).resolve(), way, execute, chosen)
        manifests.write(folder, manifest)
        say(f"run {folder.name}: {way} {manifest.table}, " + ("carried out" if execute else "plan only"))
        manifest = _run_phases(folder, params, manifest, stop, say)
        _note_run(params, manifest, manifest.status)
        manifests.write(folder, manifest)
        _write_record(folder, params, manifest)
    assert manifest.exit_code is not None
    return RunResult(Status(manifest.status), manifest.exit_code, folder)


def settle_abandoned(params: Params) -> None:
    """Tells the truth about runs whose runner was killed: no one else will, and their record says running."""
    for folder, old in manifests.abandoned(params.record.runs_dir, params.target.name):
        settled = manifests.interrupted(old, "the runner was killed; its end was found out by a later run")
        end_sessions(params, old.run_id)
        manifests.write(folder, settled)
        _write_record(folder, params, settled)


def end_sessions(params: Params, run_id: str, grace_s: float = 0) -> int:
    """Cancels the statements of a run and ends its sessions after the grace; returns how many it ended.

    Raises BadInput where the server cannot be reached.
    """
    prefix = f"runbook {run_id} "[:63]  # PostgreSQL keeps 63 bytes of an application name
    with db.connect(params, f"runbook-runner {run_id}") as connection:
        db.one(connection, SQL["cancel_statements"], params, prefix=prefix)
        time.sleep(grace_s)
        return int(db.one(connection, SQL["end_sessions"], params, prefix=prefix)["sessions"])


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check(params: Params, way: str, first: str | None, last: str | None) -> None:
    order = ORDERS[way]
    problems = [_unknown_phase(p, order) for p in (first, last) if p is not None and p not in order]
    if not problems and first and last and order.index(first) > order.index(last):
        problems = [
            _bad_choice("runner.range_is_in_order", f"{first} to {last}", f"{last} comes before {first}", "swap them")
        ]
    missing = [n for n in order if not (notebooks() / way / f"{n}.ipynb").is_file()] if not problems else []
    if missing:
        do = f"install with `pip install --editable .`, or set {NOTEBOOKS_ENV} to the folder that holds {way}/"
        problems = [_bad_choice("runner.notebooks_are_there", str(notebooks() / way), f"no {missing[0]}.ipynb", do)]
    if problems:
        raise BadInput(problems)
    if way == "migrate":
        # The way back must not depend on what only the way forward needs, a model for instance.
        found = input_problems(params)
        if found.failed:
            raise BadInput(found.failed)
    else:
        db.connect(params, "runbook-runner").close()


def _unknown_phase(name: str, order: tuple[str, ...]) -> Gate:
    near = difflib.get_close_matches(name, order, n=1, cutoff=0.4) or [p for p in order if p.startswith(name[:2])]
    do = f"did you mean {near[0]}?" if near else f"phases: {', '.join(order)}"
    return _bad_choice("runner.phase_is_known", name, "no such phase", do)


def _bad_choice(name: str, subject: str, found: str, do: str) -> Gate:
    return Gate(
        name,
        Verdict.FAIL,
        subject,
        found,
        "phases of this runbook, in their order",
        "another phase than the one meant would run; nothing was started",
        do,
    )


def _chosen(
    params: Params, way: str, first: str | None, last: str | None, execute: bool, say: Callable[[str], None]
) -> tuple[str, ...]:
    order = ORDERS[way]
    if first is None and execute and way == "migrate":
        with db.connect(params, "runbook-runner") as connection:
            ledger = Ledger(connection, params, "", "")
            proved = [p for p in order if ledger.phase_verdict(p) == Verdict.PASS]
        first = next((p for p in order if p not in proved), None)
        if first is None or (last is not None and order.index(first) > order.index(last)):
            say(f"{SYMBOLS[Status.PASSED]} nothing left to do: {last or 'every phase'} has passed in this database")
            return ()
        if first != order[0]:
            say(f"proved in this database up to {order[order.index(first) - 1]}; going on with {first}")
    start = order.index(first) if first else 0
    end = order.index(last) + 1 if last else len(order)
    return order[start:end]


def _new_folder(runs_dir: Path, target: str) -> Path:
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{target}"
    for n in range(1, 100):
        folder = (runs_dir / (stem if n == 1 else f"{stem}-{n}")).resolve()
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{runs_dir / stem}: a hundred runs in one second")


def _first_manifest(
    run_id: str, params: Params, params_file: Path, way: str, execute: bool, chosen: tuple[str, ...]
) -> Manifest:
    return Manifest(
        run_id=run_id,
        target=params.target.name,
        table=f"{params.target.schema_}.{params.target.table}",
        way=way,
        execute=execute,
        status=Status.RUNNING,
        exit_code=None,
        started=manifests.now(),
        finished="",
        params_file=str(params_file),
        parameters=params.for_record(),
        versions=_versions(params),
        phases=tuple(PhaseRun(name) for name in chosen),
    )


def _versions(params: Params) -> dict[str, str]:
    own = {
        "python": platform.python_version(),
        "runbook": runbook_lib.__version__,
        "papermill": version("papermill"),
        "psycopg": version("psycopg"),
    }
    try:
        with db.connect(params, "runbook-runner") as connection:
            server = db.one(connection, SQL["versions"], params)
    except (BadInput, psycopg.Error):
        return own
    return own | {"PostgreSQL": str(server["postgresql"]), "pgvector": str(server["pgvector"] or "not installed")}


class _Stop:
    """Whether somebody asked this run to stop, and whether an exception may be raised where the code stands."""

    def __init__(self) -> None:
        self.requested = ""
        self.raises = False


@contextmanager
def _stopped_by_signals(params: Params, run_id: str) -> Iterator[_Stop]:
    """SIGINT and SIGTERM cancel the run's statement at once and interrupt the notebook; the rest is still written.

    A second signal changes nothing: the end is bounded, and the record must not be cut off.
    """
    stop = _Stop()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            return
        stop.requested = signal.Signals(number).name
        # On a thread: the kernel may be too busy to be told, and the statement must be gone in any case.
        threading.Thread(target=_quietly, args=(end_sessions, params, run_id, GRACE_S), daemon=True).start()
        if stop.raises:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quietly(do: Callable[..., Any], *values: Any) -> str:
    """Does what may fail because the server is gone; returns why it did, or nothing."""
    try:
        do(*values)
    except (BadInput, psycopg.Error) as error:
        return " ".join(str(error).split())
    return ""


def _run_phases(
    folder: Path, params: Params, manifest: Manifest, stop: _Stop, say: Callable[[str], None]
) -> Manifest:
    """Phase after phase, up to the first that does not pass; the manifest as it stands at the end."""
    started_noted = _note_run(params, manifest, "started")
    exit_code = EXIT_CODES[Status.PASSED]
    for position, pending in enumerate(manifest.phases):
        running = replace(pending, status=Status.RUNNING, started=manifests.now())
        manifest = manifest.with_phase(running)
        manifests.write(folder, manifest)
        clock = time.perf_counter()
        outcome = _run_notebook(folder, params, manifest, pending.name, stop)
        seconds = round(time.perf_counter() - clock, 3)
        manifest = _settle(
            folder, params, manifest, replace(running, status=outcome.status, seconds=seconds, error=outcome.error)
        )
        started_noted = started_noted or _note_run(params, manifest, "started")
        say(f"{SYMBOLS[outcome.status]} {pending.name:<26} {outcome.status:<12} {duration(seconds)}")
        nothing_done = position == 0 and outcome.raised == BadInput.__name__
        exit_code = BAD_INPUT if nothing_done else EXIT_CODES[outcome.status]
        if outcome.status not in (Status.PASSED, Status.PLANNED):
            say(outcome.error)
            break
    return replace(
        manifest,
        status=outcome.status,
        exit_code=exit_code,
        finished=manifests.now(),
        versions=manifest.versions | _versions(params),
    )


def _settle(folder: Path, params: Params, manifest: Manifest, done: PhaseRun) -> Manifest:
    """What follows a notebook, however it ended: no session left, a true file, its hash, the manifest."""
    notes = list(manifest.notes)
    if done.status not in (Status.PASSED, Status.PLANNED) and (
        why := _quietly(end_sessions, params, manifest.run_id)
    ):
        notes.append(f"{done.name}: could not ask the server whether a statement still runs: {why}")
    sha256 = ""
    try:
        sha256 = tell_the_truth(folder / f"{done.name}.ipynb", done, manifest.run_id)
    except OSError as error:
        notes.append(f"{done.name}: its notebook could not be saved again: {error}")
    done = replace(done, sha256=sha256)
    if manifest.execute and sha256 and (why := _quietly(_note_notebook, params, manifest.run_id, done)):
        notes.append(f"{done.name}: its hash did not reach the ledger: {why}")
    manifest = replace(manifest.with_phase(done), notes=tuple(notes))
    manifests.write(folder, manifest)
    return manifest


def _run_notebook(folder: Path, params: Params, manifest: Manifest, name: str, stop: _Stop) -> Outcome:
    source = notebooks() / manifest.way / f"{name}.ipynb"
    if stop.requested:
        return Outcome(Status.INTERRUPTED, f"stopped by {stop.requested} before it began", "KeyboardInterrupt")
    try:
        stop.raises = True
        executed = papermill.execute_notebook(
            _not_a_format(source),
            _not_a_format(folder / f"{name}.ipynb"),
            {"params_file": manifest.params_file, "run_id": manifest.run_id, "execute": manifest.execute},
            kernel_name="python3",
            cwd=source.parent,
            progress_bar=False,
            log_output=False,
            coalesce_streams=True,
            extra_arguments=[QUIET_KERNEL],
        )
    except KeyboardInterrupt:
        # The notebook's tasks were left where they stood; asyncio would report each of them at the end.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        return Outcome(Status.INTERRUPTED, f"stopped by {stop.requested or 'SIGINT'}", "KeyboardInterrupt")
    except PapermillExecutionError as error:
        status = ENDS.get(error.ename, Status.CRASHED)
        text = f"{error.ename}: {error.evalue}" if status is Status.CRASHED else str(error.evalue).strip("\n")
        return Outcome(status, text[:LONGEST_ERROR], error.ename)
    except DeadKernelError:
        return Outcome(Status.CRASHED, "the kernel died: killed, or out of memory", "DeadKernelError")
    except CellTimeoutError as error:
        return Outcome(Status.CRASHED, f"a cell ran out of its time: {error}"[:LONGEST_ERROR], "CellTimeoutError")
    except Exception as error:
        # Whatever papermill, nbclient or the disk raise: the run ends here, and its record has to say so.
        return Outcome(Status.CRASHED, f"{type(error).__name__}: {error}"[:LONGEST_ERROR], type(error).__name__)
    finally:
        stop.raises = False
    if manifest.execute:
        return _by_the_ledger(params, manifest.run_id, name)
    if all(_was_run(c) for c in executed.cells if c.cell_type == "code" and c.source.strip()):
        return Outcome(Status.PLANNED)
    return Outcome(Status.CRASHED, "the notebook stopped before its last cell, without an error (sys.exit?)")


def _not_a_format(path: Path) -> str:
    """papermill puts paths through str.format."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def _by_the_ledger(params: Params, run_id: str, phase: str) -> Outcome:
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
    content = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
    manifests.write_atomically(path, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _note_notebook(params: Params, run_id: str, done: PhaseRun) -> None:
    with db.connect(params, "runbook-runner") as connection:
        ledger = Ledger(connection, params, run_id, done.name)
        if ledger.exists():
            body = {"phase": done.name, "sha256": done.sha256, "status": str(done.status)}
            ledger.append("notebook", body)


def _note_run(params: Params, manifest: Manifest, status: str) -> bool:
    """The first or the last row of a run; False where nothing is carried out or there is no ledger (yet)."""
    if not manifest.execute:
        return False
    try:
        with db.connect(params, "runbook-runner") as connection:
            ledger = Ledger(connection, params, manifest.run_id, manifest.way)
            if not ledger.exists():
                return False
            ledger.append(
                "run",
                {
                    "status": str(status),
                    "execute": manifest.execute,
                    "from": manifest.phases[0].name,
                    "to": manifest.phases[-1].name,
                    "started": manifest.started,
                },
            )
    except (BadInput, psycopg.Error):
        return False  # the manifest says how the run ended, and no statement depends on this row
    return True


def _write_record(folder: Path, params: Params, manifest: Manifest) -> None:
    from runbook_lib import record  # its pictures cost half a second that a refused run need not wait for

    record.write(folder, params, manifest)
