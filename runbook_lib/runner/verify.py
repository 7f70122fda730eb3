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

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, Gates, Verdict, gate
from runbook_lib.core.ledger import SQL, Ledger, only_the_owner_wrote, storable
from runbook_lib.params import Params
from runbook_lib.runner import manifest as manifests
from runbook_lib.runner.manifest import Manifest, PhaseRun

LEDGER_COPY = "ledger.json"
SEPARATOR = "\x1f"
LONGEST_SHOWN = 60
UNCHANGED = "as it was when the run wrote it"
RESTORE = "restore it from a copy, or rely on the ledger alone"


def note_notebook(params: Params, run_id: str, done: PhaseRun, path: Path) -> None:
    """A ledger row with the hash of an executed notebook, and of each of its cells."""
    with db.connect(params, "runbook-runner") as connection:
        ledger = Ledger(connection, params, run_id, done.name)
        if ledger.exists():
            body = {"phase": done.name, "sha256": done.sha256, "status": str(done.status), "cells": _cells(path)}
            ledger.append("notebook", body)


def seal(folder: Path, params: Params, run: Manifest, complete: bool = True) -> str:
    """A ledger row with the manifest, and the hash of every other file of a record; returns that row's hash.

    complete: False where a page could not be written; a complete seal may follow that one. Empty where nothing was
    carried out, or there is no ledger.
    """
    if not run.execute:
        return ""
    with db.connect(params, "runbook-runner") as connection:
        ledger = Ledger(connection, params, run.run_id, run.way)
        if not ledger.exists():
            return ""
        files = {name: _sha256(folder / name) for name in _files(folder)}
        return ledger.append("record", {"files": files, "manifest": _told(run), "complete": complete})


def incomplete(params: Params, run_id: str) -> Manifest:
    """The manifest of a run whose record could not be written whole, by the ledger. Raises BadInput for any other."""
    with db.connect(params, "runbook record") as connection:
        entries = Ledger(connection, params, run_id, "").entries(run_id)
    if not entries:
        raise BadInput([_no_such_run(params, run_id)])
    seal_row = _seal(entries)
    if seal_row is None or seal_row["body"].get("complete", True):
        found = (
            f"sealed whole by row {seal_row['seq']}" if seal_row else "not sealed: it has not ended, or was killed"
        )
        raise BadInput(
            [
                Gate(
                    "record.is_incomplete",
                    Verdict.FAIL,
                    run_id,
                    found,
                    "a run that ended without the room for its record",
                    "a second record of one run could tell it in another way",
                    "check it with `runbook verify`; of a run that was killed the next run finishes the record",
                )
            ]
        )
    return manifests.of_data(seal_row["body"]["manifest"])


def _seal(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first complete seal of a run, or where there is none its newest."""
    seals = [e for e in entries if e["kind"] == "record"]
    return next((e for e in seals if e["body"].get("complete", True)), seals[-1] if seals else None)


def _told(run: Manifest) -> dict[str, Any]:
    """What a manifest says, without the seal's own hash."""
    data: dict[str, Any] = storable(manifests.as_data(run))
    return {k: v for k, v in data.items() if k != "head"}


def check(params: Params, run_id: str, head: str = "") -> Gates:
    """A gate for the chain, for who wrote it, for the head, and for each file of the run's record.

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
        rows = ledger.all_entries()
    gates = [chain, owner, *_heads(folder, {e["hash"] for e in rows}, head)]
    sealed = _seal(entries)
    before = [e for e in entries if sealed is None or e["seq"] < sealed["seq"]]
    noted = {PhaseRun(e["phase"]).file: e["body"] for e in before if e["kind"] == "notebook"}
    names = noted.keys() | {p.stem for p in folder.glob("*.ipynb")}
    gates += [_notebook(folder / f"{name}.ipynb", run_id, noted.get(name)) for name in sorted(names)]
    if sealed:
        files = {n: h for n, h in sealed["body"]["files"].items() if not n.endswith(".ipynb")}
        gates += [_file(folder / n, run_id, sha256, entries) for n, sha256 in sorted(files.items())]
        gates += [
            _manifest(folder, run_id, before, sealed),
            _nothing_planted(folder, run_id, sealed["body"]["files"]),
        ]
        gates.append(_ends_with_its_seal(run_id, [e for e in rows if e["run_id"] == run_id], sealed))
        gates.append(_list_of_runs(params, rows))
    elif any(e["kind"] == "run" for e in entries):
        gates.append(_without_seal(run_id))
    return Gates(tuple(gates))


def _nothing_planted(folder: Path, run_id: str, files: dict[str, str]) -> Gate:
    """The folder holds what the run wrote. A notebook that the ledger does not know has a gate of its own."""
    planted = [n for n in _files(folder) if n not in files and not n.endswith(".ipynb")]
    links = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink()] if folder.is_dir() else []
    said = [f"{n} was not written by the run" for n in planted] + [f"{n} is a link" for n in sorted(links)]
    said += [f"{run_id} is a link"] if folder.is_symlink() else []
    return gate(
        "record.nothing_was_added",
        not said,
        run_id,
        found="; ".join(said) or "the files that the run wrote, and no other",
        needed="no file but those that the seal names",
        danger="a reviewer would take it for a part of the record",
        do="remove it, or move it out of the record",
    )


def _ends_with_its_seal(run_id: str, rows: list[dict[str, Any]], sealed: dict[str, Any]) -> Gate:
    late = [
        f"row {e['seq']}, {e['kind']} of {e['phase']} by {e['written_by']}" for e in rows if e["seq"] > sealed["seq"]
    ]
    complete = sealed["body"].get("complete", True)
    return gate(
        "record.ends_with_its_seal",
        complete and not late,
        run_id,
        found=f"after the seal: {'; '.join(late)}"
        if late
        else f"sealed by row {sealed['seq']}" + ("" if complete else ", which says that pages could not be written"),
        needed="a seal on the whole record, and no row of the run after it",
        danger="the run has ended: whoever wrote that row wanted its record to say something else"
        if late
        else "pages of the record are missing",
        do=RESTORE if late else f"make room, then `runbook record PARAMS {run_id}`",
    )


def _list_of_runs(params: Params, rows: list[dict[str, Any]]) -> Gate:
    """index.html of all runs is what their manifests make, and the ledger knows each of this target's."""
    from runbook_lib.runner import record

    runs_dir = params.record.runs_dir
    known = {e["run_id"] for e in rows}
    said = [
        f"{m.run_id} is not in the ledger"
        for _, m in manifests.all_runs(runs_dir)
        if m.target == params.target.name and m.execute and m.phases and m.run_id not in known and _changed(m)
    ]
    said += [f"{p.name} is a link" for p in sorted(runs_dir.iterdir()) if p.is_symlink()]
    page = runs_dir / "index.html"
    if not page.is_file() or page.read_text("utf-8") != record.list_page(runs_dir):
        said.append("index.html is not what the manifests of the runs make")
    return gate(
        "record.list_of_runs_agrees",
        not said,
        f"{runs_dir.name}/index.html",
        found="; ".join(said) or "it lists the runs as their manifests tell them",
        needed="the runs that the ledger knows, as their manifests tell them",
        danger="a reviewer would be led to a record that no run has written",
        do="remove what is named; the next run writes the list again",
    )


def _changed(run: Manifest) -> bool:
    """Did the run get so far that the ledger must know it? One that was refused at the start leaves no row."""
    return run.status in ("passed", "waiting") or any(p.status == "passed" for p in run.phases)


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


def _files(folder: Path) -> list[str]:
    """Every file of a record by its path in the folder, but the manifest, which the seal holds as a whole."""
    found = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return sorted(str(p) for p in found if str(p) != manifests.FILE)


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


def verify_chain(connection: db.Connection, params: Params) -> Gate:
    """Hashes the whole chain again, outside the database, and names the first row that does not fit."""
    previous, expected_seq, broken = "", 1, ""
    rows = db.rows(connection, SQL["chain"], params)
    for row in rows:
        text = previous + SEPARATOR + row["hashed_text"]
        if row["seq"] != expected_seq:
            broken = f"row {expected_seq} is missing"
        elif row["previous_hash"] != previous:
            broken = f"row {row['seq']} does not follow the row before it"
        elif hashlib.sha256(text.encode()).hexdigest() != row["hash"]:
            broken = f"row {row['seq']} ({row['kind']} of {row['phase']}, run {row['run_id']}) was changed"
        if broken:
            break
        previous, expected_seq = row["hash"], expected_seq + 1
    return gate(
        "ledger.chain_is_whole",
        not broken,
        f"{params.ledger.schema_}.entry",
        found=broken or f"{len(rows)} rows, each fits the one before it",
        needed="every row as it was written, in order, none missing",
        danger="somebody changed the record of what was done; its figures cannot be relied on",
        do="compare with the executed notebooks and a backup from before the named row",
        figures={"rows": len(rows)},
    )


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
            danger="rows were cut off the end of the ledger, or the whole chain was rewritten",
            do="compare with a backup of the database from the end of the run",
        )
        for what, head in heads.items()
        if head
    ]


def _notebook(path: Path, run_id: str, noted: dict[str, Any] | None) -> Gate:
    actual = _sha256(path) if path.is_file() and not path.is_symlink() else None
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
    actual = _sha256(path) if path.is_file() and not path.is_symlink() else None
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


def _manifest(folder: Path, run_id: str, entries: list[dict[str, Any]], sealed: dict[str, Any]) -> Gate:
    """What the manifest says is what the seal holds of it, or for a seal of an earlier release what the rows say."""
    told = sealed["body"].get("manifest")
    try:
        run = manifests.read(folder)
        now = json.loads((folder / manifests.FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        said = [f"unreadable: {type(error).__name__}"]
    else:
        if told is not None:
            keys = sorted({*told, *now} - {"head"})
            # In ASCII on both sides: the ledger has that where the database's encoding lacks a character.
            strange = {c for c in json.dumps([now, told], ensure_ascii=False) if not c.isascii()}
            said = [
                f"{k} {_short(now.get(k))}, by the ledger {_short(told.get(k))}"
                for k in keys
                if storable(now.get(k), strange) != storable(told.get(k), strange)
            ]
        else:
            last = [e["body"]["status"] for e in entries if e["kind"] == "run"][-1]
            hashes = {e["phase"]: e["body"]["sha256"] for e in entries if e["kind"] == "notebook"}
            said = [f"status {run.status}, by the ledger {last}"] if run.status != last else []
            said += [f"another hash of {p.name}" for p in run.phases if p.sha256 and p.sha256 != hashes.get(p.name)]
    return gate(
        "record.manifest_agrees",
        not said,
        f"{run_id}/{manifests.FILE}",
        found="; ".join(said) or "it says what the ledger says",
        needed="all that it said when the run ended",
        danger="how the run ended is told in two ways",
        do=RESTORE,
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


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
