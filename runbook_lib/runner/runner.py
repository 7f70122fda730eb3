"""Runs the notebooks in order through papermill, and tells the truth about how it ended.

A phase has passed here only if the ledger holds its verdict; everything else is read from what was raised.
"""

from __future__ import annotations

import logging
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import papermill
import psycopg
import tenacity

import runbook_lib
from runbook_lib.core import claim, db, maintenance_window
from runbook_lib.core.display import duration, plain
from runbook_lib.core.gates import BadInput, OutsideWindow
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.redaction import redacted
from runbook_lib.core.registry import STEPS, current, notebook, notebooks, waits
from runbook_lib.core.target import load_params
from runbook_lib.params import Params
from runbook_lib.runner import ending, finishing, folders, kernels, selection, verify
from runbook_lib.runner import manifest as manifests
from runbook_lib.runner.ending import Outcome
from runbook_lib.runner.finishing import Say
from runbook_lib.runner.kernels import Kernels
from runbook_lib.runner.manifest import BAD_INPUT, EXIT_CODES, SYMBOLS, Manifest, PhaseRun, Status
from runbook_lib.runner.stopping import (
    TIME_LIMIT,
    Stop,
    end_sessions,
    limited_to,
    quietly,
    stopped_by_signals,
    watched,
)
from runbook_lib.sql import load

SQL = load("runner")

# What jupyter_client says of a kernel that died before its first cell, and how often one is started.
NEVER_STARTED, KERNEL_STARTS = "Kernel died before replying to kernel_info", 3

logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it would say, the record says better


@dataclass(frozen=True)
class RunResult:
    """How a run ended. folder: its record; None where nothing was left to do. error: what stopped it.

    head: hash of the ledger's newest row, to be kept where nobody who can write the ledger can write.
    """

    status: Status
    exit_code: int
    folder: Path | None
    error: str = ""
    head: str = ""


def run(
    params_file: str | Path,
    *,
    execute: bool,
    first: str | None = None,
    last: str | None = None,
    way: str = "migrate",
    say: Say | None = None,
    verbose: bool = False,
) -> RunResult:
    """Runs phases ``first`` to ``last`` of ``migrate`` or ``undo``, stopping at the first that does not pass; or one
    operation, which is both ``first`` and ``last`` of ``operate``, or its rollback, of ``undo``.

    With ``execute`` and no ``first``, a migration goes on where the ledger says that it stands; phases proved
    before are not run again. ``say`` gets the progress, a line a phase; standard error if not given. ``verbose``:
    as log lines, with time and run id, the beginning of each phase too.
    Raises BadInput, before anything was started and without a record, for parameters that cannot be worked with.
    """
    say = say or _to_standard_error
    first, last = (name and current(name, way) for name in (first, last))
    params = load_params(params_file)
    selection.check(params, way, first, last)
    if execute:
        with db.connect(params, "runbook-runner") as connection:
            Ledger(connection, params, "", "").bring_up_to_date()
    chosen = selection.chosen(params, way, first, last, execute, say)
    if not chosen:
        return RunResult(Status.PASSED, EXIT_CODES[Status.PASSED], None)
    finishing.settle_abandoned(params, execute)
    folder = folders.new_folder(params.record, params.target.name)
    manifest = first_manifest(folder.name, params, Path(params_file).resolve(), way, execute, chosen)
    if verbose:
        say = _stamped(say, folder.name)
    with stopped_by_signals(params, folder.name) as stop:
        finishing.save(folder, manifest)
        say(f"run {folder.name}: {way} {manifest.table}, " + ("carried out" if execute else "plan only"))
        manifest = _run_claimed(folder, params, manifest, stop, say, verbose)
        manifest = finishing.finish(folder, params, manifest, say)
        if manifest.head:
            say(f"the ledger ends with {manifest.head}")
    from runbook_lib.runner import record

    record.prune(params, manifest)
    assert manifest.exit_code is not None
    error = next((p.error for p in manifest.phases if p.error), "")
    if manifest.status == Status.PASSED and manifest.exit_code:
        error = manifest.notes[-1]
    return RunResult(Status(manifest.status), manifest.exit_code, folder, error, manifest.head)


def _note_server(params: Params, manifest: Manifest, say: Say) -> None:
    """Says, and writes down, that the server is on another timeline than before; no statement depends on it."""
    try:
        with db.connect(params, "runbook-runner") as connection:
            ledger = Ledger(connection, params, manifest.run_id, manifest.way)
            if not ledger.exists():
                return
            was, now = ledger.latest("server"), db.one(connection, SQL["timeline"], params)
            if was != now:
                ledger.append("server", now)
    except (BadInput, psycopg.Error):
        return  # some managed services do not tell
    if was and was != now:
        say(
            f"the server is on timeline {now['timeline']}, and was on {was['timeline']}: a standby was promoted, or a"
            " backup recovered; what had not reached it is done again, as its ledger says"
        )


def _to_standard_error(line: str) -> None:
    print(plain(redacted(line)), file=sys.stderr, flush=True)


def _stamped(say: Say, run_id: str) -> Say:
    """The same lines as a log: each with the time and the run's id."""

    def stamp(text: str) -> None:
        for line in text.splitlines():
            say(f"{manifests.now()} {run_id} {line}")

    return stamp


def first_manifest(
    run_id: str, params: Params, params_file: Path, way: str, execute: bool, chosen: tuple[str, ...]
) -> Manifest:
    """The manifest of a run that begins now."""
    versions, server = _server(params)
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
        versions=versions,
        user=manifests.os_user(),
        server=server,
        phases=tuple(PhaseRun(name) for name in chosen),
    )


def _server(params: Params) -> tuple[dict[str, str], str]:
    """Versions, and the database and server that the connection leads to; empty where it cannot be reached."""
    own = {
        "python": platform.python_version(),
        "runbook": runbook_lib.__version__,
        "papermill": version("papermill"),
        "psycopg": version("psycopg"),
    }
    try:
        with db.connect(params, "runbook-runner") as connection:
            found, info = db.one(connection, SQL["versions"], params), connection.info
            server = f"{info.dbname} at {info.host}:{info.port}"
    except (BadInput, psycopg.Error):
        return own, ""
    versions = {"PostgreSQL": str(found["postgresql"]), "pgvector": str(found["pgvector"] or "not installed")}
    return own | versions, server


def _run_claimed(folder: Path, params: Params, manifest: Manifest, stop: Stop, say: Say, verbose: bool) -> Manifest:
    """The phases, with the target held from the first to the last.

    A plan changes nothing and needs no claim, nor does what may run beside another run.
    """
    with ExitStack() as held:
        claims = manifest.execute and not all(STEPS[p.name].concurrent for p in manifest.phases)
        if claims:
            try:
                held.enter_context(claim.held_by_runner(params, manifest.run_id))
            except BadInput as error:
                refused = replace(manifest.phases[0], status=Status.FAILED, error=str(error).strip("\n"))
                say(f"{SYMBOLS[Status.FAILED]} {refused.name:<26} {refused.status}")
                say(refused.error)
                return replace(
                    manifest.with_phase(refused),
                    status=Status.FAILED,
                    exit_code=BAD_INPUT,
                    finished=manifests.now(),
                )
        if manifest.execute:
            held.enter_context(watched(params, manifest.run_id, stop, claimed=claims))
            _note_server(params, manifest, say)
        ahead = held.enter_context(kernels.ahead([notebooks() / notebook(p.name) for p in manifest.phases]))
        return _run_phases(folder, params, manifest, ahead, stop, say, verbose)


def _run_phases(
    folder: Path, params: Params, manifest: Manifest, ahead: Kernels, stop: Stop, say: Say, verbose: bool
) -> Manifest:
    """Phase after phase, up to the first that does not pass; the manifest as it stands at the end."""
    started_noted = finishing.note_run(params, manifest, "started")
    exit_code = EXIT_CODES[Status.PASSED]
    for position, pending in enumerate(manifest.phases):
        running = replace(pending, status=Status.RUNNING, started=manifests.now())
        manifest = manifest.with_phase(running)
        finishing.save(folder, manifest)
        if verbose:
            say(f"{SYMBOLS[Status.RUNNING]} {pending.name}")
        clock = time.perf_counter()
        outcome = _run_phase(folder, params, manifest, pending.name, ahead, stop, say)
        seconds = round(time.perf_counter() - clock, 3)
        manifest = _settle(
            folder, params, manifest, replace(running, status=outcome.status, seconds=seconds, error=outcome.error)
        )
        started_noted = started_noted or finishing.note_run(params, manifest, "started")
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
        versions=manifest.versions | _server(params)[0],
    )


def _run_phase(
    folder: Path, params: Params, manifest: Manifest, name: str, ahead: Kernels, stop: Stop, say: Say
) -> Outcome:
    """One notebook, inside the maintenance window and its time limit."""
    if stop.requested:
        return Outcome(Status.INTERRUPTED, f"stopped by {stop.requested} before it began", "KeyboardInterrupt")
    minutes = params.run.timeout_minutes(name)
    try:
        stop.raises = True
        if manifest.execute and waits(name):
            maintenance_window.enter(params, say=say)
        with limited_to(minutes, stop):
            executed = _execute(folder, manifest, name, ahead)
    except KeyboardInterrupt:
        # The notebook's tasks were left where they stood; asyncio would report each of them at the end.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        of = f" of {minutes:g} minutes (run.phase_timeout_minutes)" if stop.requested == TIME_LIMIT else ""
        return Outcome(Status.INTERRUPTED, f"stopped by {stop.requested or 'SIGINT'}{of}", "KeyboardInterrupt")
    except OutsideWindow as error:
        return Outcome(Status.WAITING, str(error).strip("\n"), OutsideWindow.__name__)
    except Exception as error:
        return ending.of_error(error)
    finally:
        stop.raises = False
    if manifest.execute:
        return ending.by_the_ledger(params, manifest.run_id, name)
    return ending.of_plan(executed)


def _execute(folder: Path, manifest: Manifest, name: str, ahead: Kernels) -> Any:
    """One notebook through papermill.

    A kernel's ports are chosen before it binds them: where several start on a machine at once, one may find its port
    taken, and dies before its first cell. Then another is started.
    """
    source = notebooks() / notebook(name)
    starts = tenacity.Retrying(
        retry=tenacity.retry_if_exception_message(NEVER_STARTED),
        stop=tenacity.stop_after_attempt(KERNEL_STARTS),
        reraise=True,
    )

    def execute() -> Any:
        return papermill.execute_notebook(
            _not_a_format(source),
            _not_a_format(folder / f"{PhaseRun(name).file}.ipynb"),
            {"params_file": manifest.params_file, "run_id": manifest.run_id, "execute": manifest.execute},
            engine_name=kernels.ENGINE,
            kernel_name="python3",
            cwd=source.parent,
            progress_bar=False,
            log_output=False,
            ahead=ahead,
            notebook=source,
        )

    return starts(execute)


def _not_a_format(path: Path) -> str:
    """papermill puts paths through str.format."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def _settle(folder: Path, params: Params, manifest: Manifest, done: PhaseRun) -> Manifest:
    """What follows a notebook, however it ended: no session left, a true file, its hash, the manifest."""
    notes = list(manifest.notes)
    if done.status not in (Status.PASSED, Status.PLANNED) and (why := quietly(end_sessions, params, manifest.run_id)):
        notes.append(f"{done.name}: could not ask the server whether a statement still runs: {why}")
    path, sha256 = folder / f"{done.file}.ipynb", ""
    try:
        sha256 = ending.tell_the_truth(path, done, manifest.run_id)
    except OSError as error:
        notes.append(f"{done.name}: its notebook could not be saved again: {error}")
    done = replace(done, sha256=sha256)
    if manifest.execute and sha256 and (why := quietly(verify.note_notebook, params, manifest.run_id, done, path)):
        notes.append(f"{done.name}: its hash did not reach the ledger: {why}")
    manifest = replace(manifest.with_phase(done), notes=tuple(notes))
    finishing.save(folder, manifest)
    return manifest
