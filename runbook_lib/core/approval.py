"""Sign-off: a phase that the parameters name waits for a second person, who approves this plan on this evidence.

The notebook writes a request into the ledger: the statements that it would carry out, and the row up to which the
phases before it were proved. An approval repeats both hashes. Who asked and who approved is the ledger's own
``session_user``, which no SET ROLE changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import runbook_lib
from runbook_lib.core import db
from runbook_lib.core.gates import Gates, NotApproved, Verdict, gate, not_run
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.registry import (
    OPERATE,
    UNDO_OPERATION,
    current,
    names_in_the_ledger,
    notebook,
    notebooks,
    operation_of,
    relied_on,
)
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("approval")

# Sections that say how a run is run, and where, not what it does: the approver's own may differ.
NOT_APPROVED = {"connection", "approval", "notify", "record"}

MISSING = "not there"
LIBRARY = f"runbook_lib {runbook_lib.__version__}"

DANGER = "one person alone would carry out what the parameters want two to answer for"


@dataclass(frozen=True)
class Asked:
    """What a sign-off is bound to. statements: SHA-256 of each. evidence: hash of the newest row it rests on."""

    statements: tuple[str, ...]
    parameters: str
    evidence_seq: int
    evidence: str
    inputs: tuple[tuple[str, str], ...] = ()

    @property
    def plan(self) -> str:
        """SHA-256 of statements, parameters and files."""
        return _sha256([*self.statements, self.parameters, *self.inputs])

    def as_data(self) -> dict[str, Any]:
        """As plain data, for the ledger."""
        return {
            "statements": list(self.statements),
            "parameters": self.parameters,
            "plan_sha256": self.plan,
            "evidence_seq": self.evidence_seq,
            "evidence": self.evidence,
            "inputs": dict(self.inputs),
        }

    @classmethod
    def of(cls, body: dict[str, Any]) -> Asked:
        """From the body of a request, or of a sign-off."""
        return cls(
            tuple(body["statements"]),
            body["parameters"],
            body["evidence_seq"],
            body["evidence"],
            tuple(sorted(body.get("inputs", {}).items())),
        )


def check(step: str, ledger: Ledger, execute: bool, planned: Callable[[], list[dict[str, str]]]) -> Gates:
    """The gate of the sign-off; none for a phase that needs none. Requests a missing one; a plan only says so. The
    rollback of an operation needs its own sign-off if the operation needs one.

    Raises NotApproved, saying what voids an approval that is there: the plan, newer evidence, or who gave it.
    """
    if operation_of(step) not in waiting_steps(ledger, execute):
        return Gates(())
    needed = "the sign-off of another database user"
    given = newest_row(ledger.connection, ledger.params, step, "approval") if ledger.exists() else None
    none = f"{step} has no sign-off"
    if given is None and not execute:
        return _asked_for_later(step, none, needed)
    statements = planned()
    asked = what_is_asked(step, ledger, statements)
    refused = _void(step, ledger, asked, given) if given else none
    if refused and not execute:
        return _asked_for_later(step, refused, needed)
    if given is None or refused:
        _ask(ledger, asked, statements)
        raise NotApproved(
            found=refused,
            needed=f"{needed} for plan {asked.plan[:16]} on evidence {asked.evidence[:16]}",
            danger=DANGER,
            do=f"let another person run `runbook approve PARAMS {step}`, then run the same command again",
        )
    reason = f": {given['body']['reason']}" if given["body"]["reason"] else ""
    return Gates(
        (
            gate(
                "approval.is_given",
                True,
                step,
                found=f"by {given['written_by']} at {written_at(given)}{reason}",
                needed=needed,
                figures={"row": given["seq"], "plan": asked.plan, "evidence": asked.evidence},
            ),
        )
    )


def _asked_for_later(step: str, found: str, needed: str) -> Gates:
    """Of a plan: what is approved is what the step would run when its turn has come, so that it asks then."""
    return Gates((not_run("approval.is_given", step, f"{found}; it asks for one when it is about to run", needed),))


def waiting_steps(ledger: Ledger, note: bool = False) -> set[str]:
    """The phases that wait: those that the parameters name, and those that they ever named on this target.

    note: writes them down. Who takes one out of the file does not take it out of here.
    """
    noted = {current(name) for name in (ledger.latest("waits") or {"phases": []})["phases"]}
    waiting = noted.union(ledger.params.approval.phases)
    if note and waiting != noted and ledger.exists():
        replace(ledger, phase="approval").append("waits", {"phases": sorted(waiting)})
    return waiting


def _differing(approved: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(what for what in approved.keys() | now.keys() if approved.get(what) != now.get(what))


def what_is_asked(step: str, ledger: Ledger, statements: list[dict[str, str]]) -> Asked:
    """What a sign-off of these statements is bound to now."""
    row = evidence(ledger.connection, ledger.params, step)
    inputs = tuple(sorted(bound_inputs(ledger.params, step).items()))
    return Asked(tuple(_sha256(s["sql"]) for s in statements), parameters_sha256(ledger.params), *row, inputs)


def _void(step: str, ledger: Ledger, asked: Asked, given: db.Row) -> str:
    """Why an approval does not hold; empty if it does."""
    by = f"the sign-off by {given['written_by']} at {written_at(given)}"
    connection, params = ledger.connection, ledger.params
    approved = given["body"]
    here = db.one(connection, SQL["session_user"], params)["name"]
    involved = involved_users(connection, params, step) | {here: "also runs this phase"}
    if given["written_by"] in involved:
        return f"{by} does not count: {given['written_by']} {involved[given['written_by']]}"
    if approved["parameters"] != asked.parameters:
        return f"{by} is void: the plan has changed, by its parameters"
    if changed := _differing(approved.get("inputs", {}), dict(asked.inputs)):
        return f"{by} is void: {', '.join(changed)} changed since"
    # A phase that was stopped half-way goes on with what is left of its plan; that was approved.
    if new := set(asked.statements) - set(approved["statements"]):
        return f"{by} is void: the plan has changed, {len(new)} of its statements are not the approved ones"
    if approved["evidence"] != asked.evidence:
        newest = db.rows(connection, SQL["evidence"], params, **_evidence_of(step))
        of = f"row {newest[0]['seq']}, {newest[0]['kind']} of {newest[0]['phase']}" if newest else "rows are gone"
        return f"{by} is void: there is newer evidence ({of})"
    return ""


def _ask(ledger: Ledger, asked: Asked, statements: list[dict[str, str]]) -> None:
    """Writes the request down, once: a scheduler may come by every hour."""
    last = newest_row(ledger.connection, ledger.params, ledger.phase, "request")
    who = db.one(ledger.connection, SQL["session_user"], ledger.params)["name"]
    if last is None or Asked.of(last["body"]) != asked or last["written_by"] != who:
        ledger.append("request", asked.as_data() | {"plan": statements})


def involved_users(connection: db.Connection, params: Params, phase: str) -> dict[str, str]:
    """Users who cannot sign, and why: whoever proved a phase before this one."""
    proved = db.rows(connection, SQL["proved_by"], params, before=before(phase))
    return {p["written_by"]: f"ran {p['phase']}, which this sign-off rests on" for p in proved}


def evidence(connection: db.Connection, params: Params, phase: str) -> tuple[int, str]:
    """Number and hash of the newest row that a sign-off rests on."""
    found = db.rows(connection, SQL["evidence"], params, **_evidence_of(phase))
    return (found[0]["seq"], found[0]["hash"]) if found else (0, "")


def before(phase: str) -> list[str]:
    """The steps that a sign-off rests on, by every name that their rows may have."""
    return [called for name in relied_on(phase) for called in names_in_the_ledger(name)]


def _evidence_of(phase: str) -> dict[str, Any]:
    """Whose rows a sign-off rests on, and the verdicts of the phase itself after which it is used up.

    An operation that has passed needs a new sign-off the next time, and so does its rollback.
    """
    one_time = phase in OPERATE or phase in UNDO_OPERATION
    used_up = ["UNDONE", str(Verdict.PASS)] if one_time else ["UNDONE"]
    return {"phases": names_in_the_ledger(phase), "before": before(phase), "used_up": used_up}


def newest_row(connection: db.Connection, params: Params, phase: str, kind: str) -> db.Row | None:
    """The newest request, or the newest sign-off, of a step."""
    found = db.rows(connection, SQL["newest"], params, phases=names_in_the_ledger(phase), kind=kind)
    return found[0] if found else None


def parameters_sha256(params: Params) -> str:
    """SHA-256 of the parameters that decide what is done; of a path the file's name, since folders differ."""
    data = params.model_dump(exclude=NOT_APPROVED)
    return _sha256(json.loads(json.dumps(data, default=lambda v: v.name if isinstance(v, Path) else str(v))))


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def written_at(row: db.Row) -> str:
    """When a row of the ledger was written, for people."""
    return f"{row['written_at']:%Y-%m-%d %H:%M:%S %Z}"


def bound_inputs(params: Params, phase: str) -> dict[str, str]:
    """SHA-256 of the notebook, the library, and each input file, by what it is; ``not there`` where one is not."""
    files = {what: path for what, path in _files(params, phase) if path is not None}
    return {what: _sha256_of_file(path) for what, path in files.items()} | {LIBRARY: _library()}


def _files(params: Params, phase: str) -> Iterator[tuple[str, Path | None]]:
    yield f"notebook {phase}", notebooks() / notebook(phase)
    e, q = params.embeddings, params.queries
    yield "embeddings.file", e.file
    yield "embeddings.ids_file", e.ids_file
    yield "queries.file", q.file
    yield "queries.judgements", q.judgements
    yield "queries.embeddings", q.embeddings
    yield "model_change.replaces_params", params.model_change.replaces_params
    if e.callable:
        try:
            spec = importlib.util.find_spec(str(e.callable).partition(":")[0])
        except (ImportError, ValueError):
            spec = None
        yield "embeddings.callable", Path(spec.origin if spec and spec.origin else MISSING)


def _sha256_of_file(path: Path) -> str:
    try:
        if path.suffix == ".ipynb":  # what its cells say; ids and outputs carry nothing out
            cells = json.loads(path.read_text("utf-8"))["cells"]
            return hashlib.sha256(json.dumps([c["source"] for c in cells]).encode()).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError):
        return MISSING


@cache
def _library() -> str:
    """One hash over the library's own code and statements."""
    root = Path(runbook_lib.__file__).parent
    found = sorted(p for suffix in ("py", "sql", "j2") for p in root.rglob(f"*.{suffix}"))
    lines = "".join(f"{p.relative_to(root)} {_sha256_of_file(p)}\n" for p in found)
    return hashlib.sha256(lines.encode()).hexdigest()
