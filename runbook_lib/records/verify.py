"""Was the record of a run changed since? The ledger's chain, and every file of the record against its hash there.

A run ends with a row that holds the SHA-256 of each of its files; that row's own hash, the head, stands in
``manifest.json`` and is said at the end of the run. Whoever can rewrite both the ledger and the files can still
forge a record: only a head kept elsewhere finds that out.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

import nbformat

from runbook_lib import db
from runbook_lib.gates import BadInput, Gate, Gates, Verdict, gate
from runbook_lib.ledger import Ledger, only_the_owner_wrote, verify_chain
from runbook_lib.params import Params
from runbook_lib.running import manifest as manifests
from runbook_lib.running.manifest import Manifest, PhaseRun

LEDGER_COPY = "ledger.json"
SEALED = ("*.html", "*.ipynb", LEDGER_COPY)
UNCHANGED = "as it was when the run wrote it"
RESTORE = "restore it from a copy, or rely on the ledger alone"


def note_notebook(params: Params, run_id: str, done: PhaseRun, path: Path) -> None:
    """A ledger row with the hash of an executed notebook, and of each of its cells."""
    with db.connect(params, "runbook-runner") as connection:
        ledger = Ledger(connection, params, run_id, done.name)
        if ledger.exists():
            body = {"phase": done.name, "sha256": done.sha256, "status": str(done.status), "cells": _cells(path)}
            ledger.append("notebook", body)


def seal(folder: Path, params: Params, run: Manifest) -> str:
    """A ledger row with the hash of every file of a record; returns that row's hash.

    Empty where nothing was carried out, or there is no ledger.
    """
    if not run.execute:
        return ""
    with db.connect(params, "runbook-runner") as connection:
        ledger = Ledger(connection, params, run.run_id, run.way)
        if not ledger.exists():
            return ""
        return ledger.append("record", {"files": {p.name: _sha256(p) for p in _files(folder)}})


def check(params: Params, run_id: str, head: str = "") -> Gates:
    """A gate for the chain, for the head, and for each file of the run's record.

    head: one that was kept elsewhere. Raises BadInput where the server cannot be reached or has no ledger, or the
    run left nothing in it.
    """
    folder = params.record.runs_dir / run_id
    with db.connect(params, "runbook verify") as connection:
        ledger = Ledger(connection, params, run_id, "")
        entries = ledger.entries(run_id)
        if not entries:
            raise BadInput([_no_such_run(params, run_id)])
        chain = verify_chain(connection, params)
        owner = only_the_owner_wrote(connection, params)
        hashes = {e["hash"] for e in ledger.entries()}
    gates = [chain, owner, *_heads(folder, hashes, head)]
    noted = {e["phase"]: e["body"] for e in entries if e["kind"] == "notebook"}
    names = noted.keys() | {p.stem for p in folder.glob("*.ipynb")}
    gates += [_notebook(folder / f"{name}.ipynb", run_id, noted.get(name)) for name in sorted(names)]
    seals = [e for e in entries if e["kind"] == "record"]
    if seals:
        files = {n: h for n, h in seals[-1]["body"]["files"].items() if not n.endswith(".ipynb")}
        gates += [_file(folder / n, run_id, sha256, entries) for n, sha256 in sorted(files.items())]
        gates.append(_manifest(folder, run_id, entries))
    elif any(e["kind"] == "run" for e in entries):
        gates.append(_without_seal(run_id))
    return Gates(tuple(gates))


def _without_seal(run_id: str) -> Gate:
    return Gate(
        "record.is_sealed",
        Verdict.UNKNOWN,
        run_id,
        "the ledger holds no hashes of this run's pages",
        "the row that a run writes last",
        "pages, ledger.json and manifest.json may have been changed, and nobody could tell",
        "if the run was killed, start the next run of this target: it finishes the record; else read the notebooks,"
        " whose hashes are in the chain",
    )


def _files(folder: Path) -> list[Path]:
    return sorted(p for pattern in SEALED for p in folder.glob(pattern))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cells(path: Path) -> list[list[str]]:
    """Of each cell the SHA-256 of its source and of its outputs; empty where the file is no notebook."""
    try:
        notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    except (OSError, ValueError):
        return []
    return [[_of(cell.source), _of(cell.get("outputs", []))] for cell in notebook.cells]


def _of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _heads(folder: Path, hashes: set[str], kept: str) -> list[Gate]:
    """The head in the manifest, and the one kept elsewhere, are rows of the chain: its end was not cut off."""
    heads = {"the head that was given": kept} if kept else {}
    with contextlib.suppress(OSError, ValueError):  # the manifest has a gate of its own
        heads |= {f"the head in {folder.name}/{manifests.FILE}": manifests.read(folder).head}
    return [
        gate(
            "record.head_is_in_the_ledger",
            head in hashes,
            what,
            found=f"{head[:16]} is a row of the chain" if head in hashes else f"no row has the hash {head[:16]}",
            needed="a row of the ledger's chain",
            danger="rows were cut off the end of the ledger, or the whole chain was written anew",
            do="compare with a backup of the database from the end of the run",
        )
        for what, head in heads.items()
        if head
    ]


def _notebook(path: Path, run_id: str, noted: dict[str, Any] | None) -> Gate:
    actual = _sha256(path) if path.is_file() else None
    holds = actual is not None and noted is not None and actual == noted["sha256"]
    found = UNCHANGED
    if not holds:
        found = "missing" if actual is None else "the ledger knows no such notebook" if noted is None else ""
    return gate(
        "record.notebook_is_unchanged",
        holds,
        f"{run_id}/{path.name}",
        found=found or f"changed: {_changed_cells(noted.get('cells', []) if noted else [], _cells(path))}",
        needed=f"SHA-256 {noted['sha256']}" if noted else "a hash in the ledger",
        danger="its outputs are no evidence of what was done",
        do=RESTORE,
    )


def _changed_cells(noted: list[list[str]], actual: list[list[str]]) -> str:
    """Which cells differ, counted from 1 as a reader counts them."""
    if not actual:
        return "it is no notebook any more"
    if len(noted) != len(actual):
        return f"{len(actual)} cells, {len(noted)} when it was written"
    pairs = list(enumerate(zip(noted, actual, strict=True), start=1))
    said = [f"the source of cell {n}" for n, (before, now) in pairs if before[0] != now[0]]
    said += [f"the outputs of cell {n}" for n, (before, now) in pairs if before[1] != now[1]]
    return ", ".join(said) or "its metadata only"


def _file(path: Path, run_id: str, sha256: str, entries: list[dict[str, Any]]) -> Gate:
    actual = _sha256(path) if path.is_file() else None
    found = "missing" if actual is None else "changed"
    if actual not in (None, sha256) and path.name == LEDGER_COPY:
        found = f"changed: {_changed_rows(path, entries)}"
    return gate(
        "record.file_is_unchanged",
        actual == sha256,
        f"{run_id}/{path.name}",
        found=UNCHANGED if actual == sha256 else found,
        needed=f"SHA-256 {sha256}",
        danger="what a reviewer reads there is not what the run found",
        do=RESTORE,
    )


def _changed_rows(path: Path, entries: list[dict[str, Any]]) -> str:
    try:
        copies = {row["seq"]: row for row in json.loads(path.read_text("utf-8"))}
    except (ValueError, TypeError, KeyError):
        return "it is no list of rows any more"
    # The copy was made before the seal, which cannot be in it.
    rows = {e["seq"]: json.loads(json.dumps(e, default=str)) for e in entries if e["kind"] != "record"}
    said = [f"row {seq} is missing" for seq in rows if seq not in copies]
    said += [f"row {seq} is not in the ledger" for seq in copies if seq not in rows]
    said += [f"row {seq} differs from the ledger" for seq in rows if seq in copies and copies[seq] != rows[seq]]
    return ", ".join(said) or "its rows are those of the ledger, in another order or form"


def _manifest(folder: Path, run_id: str, entries: list[dict[str, Any]]) -> Gate:
    """The manifest cannot hold a hash of itself; what it says must be what the ledger says."""
    last = [e["body"]["status"] for e in entries if e["kind"] == "run"][-1]
    hashes = {e["phase"]: e["body"]["sha256"] for e in entries if e["kind"] == "notebook"}
    try:
        run = manifests.read(folder)
    except (OSError, ValueError) as error:
        said = [f"unreadable: {type(error).__name__}"]
    else:
        said = [f"status {run.status}, by the ledger {last}"] if run.status != last else []
        said += [f"another hash of {p.name}" for p in run.phases if p.sha256 and p.sha256 != hashes.get(p.name)]
    return gate(
        "record.manifest_agrees",
        not said,
        f"{run_id}/{manifests.FILE}",
        found="; ".join(said) or "it says what the ledger says",
        needed="status and hashes as in the ledger",
        danger="how the run ended is told in two ways",
        do=RESTORE,
    )


def _no_such_run(params: Params, run_id: str) -> Gate:
    known = [m.run_id for _, m in manifests.all_runs(params.record.runs_dir) if m.execute]
    near = difflib.get_close_matches(run_id, known, n=1) or known[:1]
    return Gate(
        "record.run_is_in_the_ledger",
        Verdict.FAIL,
        run_id,
        "no row of this run in the ledger of this database",
        "a run that was carried out here",
        "a record without rows in the ledger proves nothing",
        f"did you mean {near[0]}?" if near else "look into index.html of the runs folder",
    )
