"""Sign-off: a phase that the parameters name waits for a second person, who approves this plan on this evidence.

The notebook writes a request into the ledger: the statements that it would carry out, and the row up to which the
phases before it were proved. An approval repeats both hashes. Who asked and who approved is the ledger's own
``session_user``, which no SET ROLE changes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.types.json import Jsonb

from runbook_lib.core import bound_inputs, db, plans
from runbook_lib.core.display import Table
from runbook_lib.core.gates import BadInput, Gate, Gates, NotApproved, RunbookError, Verdict, gate, not_run
from runbook_lib.core.ledger import Ledger, storable_in
from runbook_lib.core.registry import (
    OPERATE,
    UNDO_OPERATION,
    current,
    names_in_the_ledger,
    operation_of,
    relied_on,
    short,
)
from runbook_lib.params import Params
from runbook_lib.sql import load

if TYPE_CHECKING:
    from runbook_lib.core.phase import Phase

SQL, LEDGER = load("approval"), load("ledger")
# What an approver needs, and on what: no right to write anything but sign-offs.
RIGHTS = {"USAGE": "SCHEMA {schema}", "SELECT": "{schema}.entry", "EXECUTE": "FUNCTION {schema}.sign_off"}

# Sections that say how a run is run, and where, not what it does: the approver's own may differ.
NOT_APPROVED = {"connection", "approval", "notify", "record"}

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


@dataclass(frozen=True)
class Pending:
    """A request as the approver sees it. evidence, gates: what the phases before it have proved."""

    phase: str
    request: int
    asked_by: str
    asked_at: str
    run_id: str
    statements: tuple[dict[str, str], ...]
    asked: Asked
    evidence: Table
    gates: Table

    def __str__(self) -> str:
        plan = "\n\n".join(
            f"-- {s['purpose']}\n-- lock: {s['lock'] or 'none'}; blocks {s['blocks']}; undo: {s['undo']}\n{s['sql']}"
            for s in self.statements
        )
        return "\n".join(
            [
                f"{self.phase}, asked for by {self.asked_by} at {self.asked_at} (run {self.run_id})",
                f"\nPlan {self.asked.plan[:16]}\n\n{plan or 'no statement that changes anything'}",
                f"\nEvidence {self.asked.evidence[:16]} (ledger row {self.asked.evidence_seq})\n\n{self.evidence}",
                f"\n{self.gates}",
            ]
        )


def check(phase: Phase) -> Gates:
    """The gate of the sign-off; none for a phase that needs none. Asks for it where it is missing. The way back of an
    operation needs one, of its own, where the operation does.

    Raises NotApproved, saying what voids an approval that is there: the plan, newer evidence, or who gave it.
    """
    if operation_of(phase.name) not in _waiting(phase.ledger, phase.execute):
        return Gates(())
    needed = "the sign-off of another database user"
    if not phase.execute:
        return Gates((not_run("approval.is_given", phase.name, needed),))
    asked, statements = _what_is_asked(phase)
    ledger = phase.ledger
    given = _newest(ledger.connection, ledger.params, phase.name, "approval")
    refused = _void(phase, asked, given) if given else f"{phase.name} has no sign-off"
    if given is None or refused:
        _ask(ledger, asked, statements)
        raise NotApproved(
            found=refused,
            needed=f"{needed} for plan {asked.plan[:16]} on evidence {asked.evidence[:16]}",
            danger=DANGER,
            do=f"let another person run `runbook approve PARAMS {phase.name}`, then run the same command again",
        )
    reason = f": {given['body']['reason']}" if given["body"]["reason"] else ""
    return Gates(
        (
            gate(
                "approval.is_given",
                True,
                phase.name,
                found=f"by {given['written_by']} at {_at(given)}{reason}",
                needed=needed,
                figures={"row": given["seq"], "plan": asked.plan, "evidence": asked.evidence},
            ),
        )
    )


def _waiting(ledger: Ledger, note: bool = False) -> set[str]:
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


def _what_is_asked(phase: Phase) -> tuple[Asked, list[dict[str, str]]]:
    statements = plans.of(phase)
    evidence = _evidence(phase.ledger.connection, phase.params, phase.name)
    hashes = tuple(_sha256(s["sql"]) for s in statements)
    inputs = tuple(sorted(bound_inputs.of(phase.params, phase.name).items()))
    return Asked(hashes, _parameters(phase.params), *evidence, inputs), statements


def _void(phase: Phase, asked: Asked, given: db.Row) -> str:
    """Why an approval does not hold; empty if it does."""
    by = f"the sign-off by {given['written_by']} at {_at(given)}"
    connection, params = phase.ledger.connection, phase.params
    approved = given["body"]
    here = db.one(connection, SQL["session_user"], params)["name"]
    involved = _involved(connection, params, phase.name) | {here: "also runs this phase"}
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
        newest = db.rows(connection, SQL["evidence"], params, **_evidence_of(phase.name))
        of = f"row {newest[0]['seq']}, {newest[0]['kind']} of {newest[0]['phase']}" if newest else "rows are gone"
        return f"{by} is void: there is newer evidence ({of})"
    return ""


def _ask(ledger: Ledger, asked: Asked, statements: list[dict[str, str]]) -> None:
    """Writes the request down, once: a scheduler may come by every hour."""
    last = _newest(ledger.connection, ledger.params, ledger.phase, "request")
    who = db.one(ledger.connection, SQL["session_user"], ledger.params)["name"]
    if last is None or _asked(last["body"]) != asked or last["written_by"] != who:
        ledger.append("request", _bound(asked) | {"plan": statements})


def pending(connection: db.Connection, params: Params, phase: str) -> Pending:
    """The request that waits for this phase's sign-off, with all that the approver must see.

    Raises BadInput where the phase needs none, or rights on the ledger are missing; NotApproved where nothing is
    asked for, the request is out of date, or this user may not answer it.
    """
    named = operation_of(phase) in params.approval.phases
    if named:
        _require_rights(connection, params)
    if not named and operation_of(phase) not in _waiting(Ledger(connection, params, "", "")):
        raise BadInput([_needs_none(params, phase)])
    _require_rights(connection, params)
    row = _newest(connection, params, phase, "request")
    if row is None:
        raise _refused(phase, f"{phase} has not asked for a sign-off", "a run that has come to this phase")
    asked = _asked(row["body"])
    _, evidence = _evidence(connection, params, phase)
    if evidence != asked.evidence:
        raise _refused(phase, "there is newer evidence than the request rests on", "a request of the newest evidence")
    if _parameters(params) != asked.parameters:
        raise _refused(phase, "the request was made with other parameters", "the parameters of that run")
    here = {what: sha for what, sha in bound_inputs.of(params, phase).items() if sha != bound_inputs.MISSING}
    if differing := [
        what for what, sha in asked.inputs if sha != bound_inputs.MISSING and here.get(what, sha) != sha
    ]:
        found = f"{', '.join(sorted(differing))} differ here from what the request was made with"
        raise _refused(phase, found, "the files of that run")
    user = db.one(connection, SQL["session_user"], params)["name"]
    involved = _involved(connection, params, phase) | {row["written_by"]: "asked for this sign-off"}
    if user in involved:
        raise NotApproved(f"{user} {involved[user]}", "another database user", DANGER, "ask a second person")
    return Pending(
        phase,
        row["seq"],
        row["written_by"],
        _at(row),
        row["run_id"],
        tuple(row["body"]["plan"]),
        asked,
        *_shown(connection, params, phase),
    )


def approve(connection: db.Connection, params: Params, shown: Pending, reason: str) -> None:
    """Writes the approval of what was shown, through the one function that others than the owner may call."""
    told = storable_in(connection, {"bound": _bound(shown.asked), "reason": reason})
    values = {"bound": Jsonb(told["bound"]), "reason": told["reason"]}
    try:
        db.one(connection, LEDGER["sign_off"], params, request=shown.request, **values)
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.RaiseException) as error:
        raise RunbookError(
            str(error.diag.message_primary), "a sign-off in the ledger", "nothing was approved", "see there"
        ) from error


def _require_rights(connection: db.Connection, params: Params) -> None:
    schema = params.ledger.schema_
    rights = db.one(connection, SQL["rights"], params, schema=schema)
    if not rights["there"]:
        raise _refused("", f"there is no ledger in schema {schema}", "a run that was carried out here")
    user = rights["session_user"]
    if missing := [right for right in RIGHTS if not rights[right]]:
        grants = "; ".join(f"GRANT {right} ON {RIGHTS[right].format(schema=schema)} TO {user}" for right in missing)
        raise BadInput(
            [
                Gate(
                    "approval.rights_are_there",
                    Verdict.FAIL,
                    f"{user} on {schema}.entry",
                    f"{', '.join(missing)} missing",
                    "USAGE on the schema, SELECT on the table, EXECUTE on sign_off",
                    "the request cannot be read, or the approval not be written",
                    f"let the ledger's owner run: {grants}",
                )
            ]
        )


def _needs_none(params: Params, phase: str) -> Gate:
    waiting = ", ".join(params.approval.phases) or "none"
    return Gate(
        "approval.phase_waits",
        Verdict.FAIL,
        phase,
        "this phase waits for no sign-off",
        f"a phase of approval.phases: {waiting}",
        "nobody would ever look at the approval",
        "name the phase in approval.phases, or run it without a sign-off",
    )


def _refused(phase: str, found: str, needed: str) -> NotApproved:
    return NotApproved(found, needed, "an approval of something else would be void", f"run `{_command(phase)}` first")


def _command(phase: str) -> str:
    if operation_of(phase) in OPERATE:
        undo = " --undo" if phase in UNDO_OPERATION else ""
        return f"runbook operate PARAMS {short(phase)}{undo} --execute"
    return "runbook run PARAMS --execute" + (f" --to {phase}" if phase else "")


def _shown(connection: db.Connection, params: Params, phase: str) -> tuple[Table, Table]:
    before = _before(phase)
    proved = db.rows(connection, SQL["proved_by"], params, before=before)
    gates = db.rows(connection, SQL["gates"], params, before=before)
    return (
        Table(
            ("phase", "verdict", "by", "at", "run"),
            [(p["phase"], p["verdict"], p["written_by"], _at(p), p["run_id"]) for p in proved],
        ),
        Table(
            ("gate", "verdict", "subject", "found"),
            [(g["name"], g["verdict"], g["subject"], g["found"]) for g in gates],
        ),
    )


def _involved(connection: db.Connection, params: Params, phase: str) -> dict[str, str]:
    """Users who cannot sign, and why: whoever proved a phase before this one."""
    proved = db.rows(connection, SQL["proved_by"], params, before=_before(phase))
    return {p["written_by"]: f"ran {p['phase']}, which this sign-off rests on" for p in proved}


def _evidence(connection: db.Connection, params: Params, phase: str) -> tuple[int, str]:
    found = db.rows(connection, SQL["evidence"], params, **_evidence_of(phase))
    return (found[0]["seq"], found[0]["hash"]) if found else (0, "")


def _before(phase: str) -> list[str]:
    return [called for name in relied_on(phase) for called in names_in_the_ledger(name)]


def _evidence_of(phase: str) -> dict[str, Any]:
    """Whose rows a sign-off rests on, and the verdicts of the phase itself after which it is used up.

    An operation that has passed is signed anew the next time, and so is its way back.
    """
    one_time = phase in OPERATE or phase in UNDO_OPERATION
    used_up = ["UNDONE", str(Verdict.PASS)] if one_time else ["UNDONE"]
    return {"phases": names_in_the_ledger(phase), "before": _before(phase), "used_up": used_up}


def _newest(connection: db.Connection, params: Params, phase: str, kind: str) -> db.Row | None:
    found = db.rows(connection, SQL["newest"], params, phases=names_in_the_ledger(phase), kind=kind)
    return found[0] if found else None


def _parameters(params: Params) -> str:
    """SHA-256 of the parameters that decide what is done; of a path the file's name, since folders differ."""
    data = params.model_dump(exclude=NOT_APPROVED)
    return _sha256(json.loads(json.dumps(data, default=lambda v: v.name if isinstance(v, Path) else str(v))))


def _bound(asked: Asked) -> dict[str, Any]:
    return {
        "statements": list(asked.statements),
        "parameters": asked.parameters,
        "plan_sha256": asked.plan,
        "evidence_seq": asked.evidence_seq,
        "evidence": asked.evidence,
        "inputs": dict(asked.inputs),
    }


def _asked(body: dict[str, Any]) -> Asked:
    return Asked(
        tuple(body["statements"]),
        body["parameters"],
        body["evidence_seq"],
        body["evidence"],
        tuple(sorted(body.get("inputs", {}).items())),
    )


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _at(row: db.Row) -> str:
    return f"{row['written_at']:%Y-%m-%d %H:%M:%S %Z}"
