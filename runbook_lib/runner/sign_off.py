"""The second person's side of a sign-off: what waits, on what evidence, and the approval of it."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg.types.json import Jsonb

from runbook_lib.core import db
from runbook_lib.core.approval import (
    DANGER,
    MISSING,
    SQL,
    Asked,
    before,
    bound_inputs,
    evidence,
    involved_users,
    newest_row,
    parameters_sha256,
    waiting_steps,
    written_at,
)
from runbook_lib.core.display import Table
from runbook_lib.core.gates import BadInput, Gate, NotApproved, RunbookError, Verdict
from runbook_lib.core.ledger import Ledger, storable_in
from runbook_lib.core.registry import OPERATE, UNDO_OPERATION, operation_of, short
from runbook_lib.params import Params
from runbook_lib.sql import load

LEDGER = load("ledger")
# What an approver needs, and on what: no right to write anything but sign-offs.
RIGHTS = {"USAGE": "SCHEMA {schema}", "SELECT": "{schema}.entry", "EXECUTE": "FUNCTION {schema}.sign_off"}


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


def pending(connection: db.Connection, params: Params, phase: str) -> Pending:
    """The request that waits for this phase's sign-off, with all that the approver must see.

    Raises BadInput where the phase needs none, or rights on the ledger are missing; NotApproved where nothing is
    asked for, the request is out of date, or this user may not answer it.
    """
    named = operation_of(phase) in params.approval.phases
    if named:
        _require_rights(connection, params)
    if not named and operation_of(phase) not in waiting_steps(Ledger(connection, params, "", "")):
        raise BadInput([_needs_none(params, phase)])
    _require_rights(connection, params)
    row = newest_row(connection, params, phase, "request")
    if row is None:
        raise _refused(phase, f"{phase} has not asked for a sign-off", "a run that has come to this phase")
    asked = Asked.of(row["body"])
    if evidence(connection, params, phase)[1] != asked.evidence:
        raise _refused(phase, "there is newer evidence than the request rests on", "a request of the newest evidence")
    if parameters_sha256(params) != asked.parameters:
        raise _refused(phase, "the request was made with other parameters", "the parameters of that run")
    here = {what: sha for what, sha in bound_inputs(params, phase).items() if sha != MISSING}
    if differing := [what for what, sha in asked.inputs if sha != MISSING and here.get(what, sha) != sha]:
        found = f"{', '.join(sorted(differing))} differ here from what the request was made with"
        raise _refused(phase, found, "the files of that run")
    user = db.one(connection, SQL["session_user"], params)["name"]
    involved = involved_users(connection, params, phase) | {row["written_by"]: "asked for this sign-off"}
    if user in involved:
        raise NotApproved(f"{user} {involved[user]}", "another database user", DANGER, "ask a second person")
    return Pending(
        phase,
        row["seq"],
        row["written_by"],
        written_at(row),
        row["run_id"],
        tuple(row["body"]["plan"]),
        asked,
        *_shown(connection, params, phase),
    )


def approve(connection: db.Connection, params: Params, shown: Pending, reason: str) -> None:
    """Writes the approval of what was shown, through the one function that others than the owner may call."""
    told = storable_in(connection, {"bound": shown.asked.as_data(), "reason": reason})
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
        "the approval would never be used",
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
    proved = db.rows(connection, SQL["proved_by"], params, before=before(phase))
    gates = db.rows(connection, SQL["gates"], params, before=before(phase))
    return (
        Table(
            ("phase", "verdict", "by", "at", "run"),
            [(p["phase"], p["verdict"], p["written_by"], written_at(p), p["run_id"]) for p in proved],
        ),
        Table(
            ("gate", "verdict", "subject", "found"),
            [(g["name"], g["verdict"], g["subject"], g["found"]) for g in gates],
        ),
    )
