"""The end of a run, also of one that was killed: its last row in the ledger, its record, who is told, the seal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psycopg

from runbook_lib.core import claim, db
from runbook_lib.core.gates import BadInput
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.target import load_params
from runbook_lib.params import Params
from runbook_lib.runner import folders, notify, verify
from runbook_lib.runner import manifest as manifests
from runbook_lib.runner.manifest import BY_HAND, EXIT_CODES, Manifest, Status
from runbook_lib.runner.stopping import end_sessions
from runbook_lib.sql import load

SQL = load("runner")

Say = Callable[[str], None]


def note_run(params: Params, manifest: Manifest, status: str) -> bool:
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
                    "host": manifest.host,
                    "pid": manifest.pid,
                    "user": manifest.user,
                },
            )
    except (BadInput, psycopg.Error):
        return False  # the manifest says how the run ended, and no statement depends on this row
    return True


def finish(folder: Path, params: Params, manifest: Manifest, say: Say | None = None) -> Manifest:
    """The last row, the pages, who is told (if anybody is, by ``say``), and the seal on all of it.

    Pages that cannot be written cost the record only those, and the run its exit code: no one may rely on a record
    that is not there. The seal says that it is incomplete, and `runbook record` completes it. A record without a seal
    costs the exit code too, and stays without one: `runbook verify` says so.
    """
    from runbook_lib.runner import record  # its pictures cost half a second that a refused run need not wait for

    note_run(params, manifest, manifest.status)
    save(folder, manifest)
    complete = True
    try:
        record.write(folder, params, manifest)
    except OSError as error:
        complete = False
        manifest = _without_page(manifest, error, say)
    if say is not None:
        for note in (notes := notify.of_run(params, manifest, folder)):
            say(note)
        manifest = replace(manifest, notes=(*notes, *manifest.notes))
    try:
        manifests.write(folder, manifest)
    except OSError as error:
        manifest, complete = (manifest if not complete else _without_page(manifest, error, say)), False
    try:
        manifest = replace(manifest, head=verify.seal(folder, params, manifest, complete))
    except (OSError, BadInput, psycopg.Error) as error:
        why = " ".join(str(error).split())
        manifest = _lacking(manifest, f"the record could not be sealed in the ledger: {why}", say)
    save(folder, manifest)
    return manifest


def _without_page(manifest: Manifest, error: OSError, say: Say | None) -> Manifest:
    do = f"make room, then `runbook record PARAMS {manifest.run_id}`"
    return _lacking(manifest, f"a page of the record could not be written: {error}; {do}", say)


def _lacking(manifest: Manifest, note: str, say: Say | None) -> Manifest:
    """A run of which the record lacks something: it is noted, said, and costs an exit code of 0."""
    if say is not None:
        say(note)
    exit_code = manifest.exit_code or EXIT_CODES[Status.CRASHED]
    return replace(manifest, exit_code=exit_code, notes=(*manifest.notes, note))


def write_again(params_file: str | Path, run_id: str) -> Path:
    """Writes the record of a run that could not be written whole, from the ledger and the notebooks, and seals it.

    Returns its page. Raises BadInput for a run whose record is sealed whole, or that the ledger does not know.
    """
    from runbook_lib.runner import record

    params = load_params(params_file)
    manifest = verify.incomplete(params, run_id)
    folder = params.record.runs_dir / run_id
    try:
        params.record.runs_dir.mkdir(params.record.folder_mode, parents=True, exist_ok=True)
        folder.mkdir(params.record.folder_mode, exist_ok=True)
        record.write(folder, params, manifest)
        manifests.write(folder, manifest)
    except OSError as error:
        raise BadInput([folders.no_record(params.record.runs_dir, error)]) from error
    manifests.write(folder, replace(manifest, head=verify.seal(folder, params, manifest, True)))
    return folder / "index.html"


def settle_abandoned(params: Params, execute: bool) -> None:
    """Tells the truth about runs whose runner was killed: no one else will, and their record says running.

    A manifest on disk proves nothing: sessions are ended, and rows written, only for a run of which the ledger says
    that it began here, by that process, and did not end; and never while its runner is still connected.
    """
    for folder, old in manifests.abandoned(params.record.runs_dir, params.target.name):
        settled = manifests.interrupted(old, "the runner was killed; a later run found out")
        if not old.execute:
            save(folder, settled)
        elif old.way == BY_HAND:
            continue  # `runbook lab` and `runbook record` make its record
        elif execute and _began_and_is_gone(params, old):
            end_sessions(params, old.run_id)
            finish(folder, params, settled)


def _began_and_is_gone(params: Params, old: Manifest) -> bool:
    with db.connect(params, "runbook-runner") as connection:
        entries = Ledger(connection, params, old.run_id, "").entries(old.run_id)
        noted = [e["body"] for e in entries if e["kind"] in ("run", "record")]
        began = len(noted) == 1 and noted[0].get("status") == "started"
        here = began and (noted[0].get("host"), noted[0].get("pid")) == (old.host, old.pid)
        name = claim.runner_name(old.run_id)
        return here and not db.one(connection, SQL["is_connected"], params, name=name)["connected"]


def save(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest; on a full disk the end of the run says so, and the work goes on."""
    with suppress(OSError):
        manifests.write(folder, manifest)
