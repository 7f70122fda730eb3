"""What somebody who is to approve a plan asks, answered from the plan: its locks, sizes and times, what was looked
at, what cannot be known yet, and what to type.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from runbook_lib.core.db import lock_level
from runbook_lib.core.display import duration, number, size
from runbook_lib.core.gates import Verdict
from runbook_lib.core.plans import BROUGHT_ABOUT, KNOWN_AFTER
from runbook_lib.core.registry import (
    MIGRATE,
    OPERATE,
    STEPS,
    UNDO,
    UNDO_OPERATION,
    current,
    operation_of,
    rollback_of,
    short,
)
from runbook_lib.runner import rollbacks
from runbook_lib.runner.figures import Entry, Figures, Newest, Tile
from runbook_lib.runner.manifest import Manifest, Status
from runbook_lib.runner.questions import LOCKS, UNREAD, Question, accepted, count, roles, who, write_cost

PLANNED, LATER, GATES = ("planned", "statements"), ("later", "what is known later"), ("gates", "gates")
FORECAST = ("forecast", "forecast")
# Of the forecast, in the order in which they are needed.
DISK = {"staging_bytes": "staging table", "table_growth_bytes": "growth of the table", "index_bytes": "index"}
TIMES = {"load_seconds": "loading", "backfill_seconds": "backfill", "build_seconds": "building the index"}
FEW = 3
# The undo of what goes with the ledger's schema, which no rollback drops.
OF_THE_LEDGER = "ledger."
NOT_KNOWN = "The rest is not known: the plan stopped before it."
# The time that the model takes is nowhere in the forecast.
NOT_IN_IT = "The time of the model, of the measurements and of waiting for locks is not in it."
ELSEWHERE = "Worked out from times of another machine; `runbook operate PARAMS rehearse --execute` measures here."


def answer(
    run: Manifest, found: Newest, own: Sequence[Entry], planned: Sequence[Mapping[str, Any]], *, read: bool
) -> list[Question]:
    """The questions of an approver, in the order in which they are asked.

    own: the rows that the plan left. planned: its statements, repetitions as one. read: could the ledger be read?
    """
    gates = [e["body"] | {"phase": e["phase"]} for e in own if e["kind"] == "gate"]
    sized = bool({p.name for p in run.phases} & {*MIGRATE}) and found("plan")
    questions = [
        Question("What would be done?", _done(run, planned), PLANNED),
        Question("Which is the strongest lock, for how long?", _lock(run, found, gates, planned), PLANNED),
        Question("How much space does it need?", _room(found, gates), GATES) if sized else None,
        Question("What does it cost afterwards?", [f"Writes: {write_cost(found)}"], FORECAST) if sized else None,
        Question("How long does it take?", _time(run, found), FORECAST),
        Question("What was checked, and what cannot be known yet?", [*_looked_at(gates), *_later(run, gates)], LATER),
        Question("What was accepted, and what needs a sign-off?", _consent(run, found, gates, read=read), GATES),
        Question("How would it be rolled back?", *_back(run)),
        Question("Who made this plan, where?", who(run, own), ("evidence", "versions and parameters")),
        Question("What do I type, and as which role does it run?", *_typed(run, own, gates)),
    ]
    return [q for q in questions if q]


def tiles(run: Manifest, found: Newest, own: Sequence[Entry], planned: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """The figures to be seen first."""
    gates = [e["body"] for e in own if e["kind"] == "gate"]
    made = []
    if strongest := _strongest(planned):
        level, took = lock_level(strongest["lock"]), _took_s(gates, strongest)
        blocks = f"blocks {strongest['blocks']}"
        made.append(
            Tile("strongest lock", level, blocks)
            if took is None
            else Tile(f"strongest lock, {level}", duration(took), f"as tried; {blocks}")
        )
    plan = found("plan")
    if plan is None or not {p.name for p in run.phases} & {*MIGRATE}:
        return []  # the lock alone is said below
    body, f = plan.body, plan.body["forecast"]
    rows = body["table_rows"] if body.get("rows_with_text") is None else body["rows_with_text"]
    return [
        *made,
        Tile("rows to migrate", number(rows), f"table {size(body['table_bytes'])}", plan.source),
        Tile("disk", size(sum(f[k] for k in DISK)), ", ".join(f"{w} {size(f[k])}" for k, w in DISK.items())),
        Tile("WAL", size(f["wal_bytes"]), "checkpoints add to it"),
        Tile("memory of the build", size(f["build_memory_bytes"]), _allowed(gates)),
        Tile("time", duration(_seconds(found)), "forecast, without model and measurements"),
    ]


def later(own: Sequence[Entry]) -> Figures | None:
    """What only the steps themselves bring about: the step, what it has to prove, and what was found of it today."""
    gates = [(e["phase"], e["body"]) for e in own if e["kind"] == "gate"]
    told = [(step, g["needed"], g["found"]) for step, g in gates if _is_later(g)]
    shown = 3 if any(not found.startswith(KNOWN_AFTER) for _, _, found in told) else 2
    columns = ("step", "has to hold when it is carried out", "today")
    rows = [(step, needed, "" if found.startswith(KNOWN_AFTER) else found) for step, needed, found in told]
    return Figures(columns[:shown], [row[:shown] for row in rows]) if rows else None


def _is_later(gate: Mapping[str, Any]) -> bool:
    """Is its fact one that the step itself brings about? That the steps before it have passed is none."""
    return gate["verdict"] == Verdict.NOT_RUN and gate["name"] not in BROUGHT_ABOUT


def undone_by(phase: str, undo: str) -> str:
    """The rollback that undoes a statement of a step; empty where none does, or where it stays with the ledger."""
    if undo.startswith(OF_THE_LEDGER):
        return ""
    return rollback_of(phase) or next((name for name in UNDO if phase in STEPS[name].rolls_back), "")


def _done(run: Manifest, planned: Sequence[Mapping[str, Any]]) -> list[str]:
    n = sum(s["times"] for s in planned)
    steps = list(dict.fromkeys(s["phase"] for s in planned))
    if not planned:
        return [_stopped(run) or "No statement that changes anything, as far as it can be known now."]
    of = f" in {len(steps)} of {len(run.phases)} steps" if len(run.phases) > 1 else ""
    least = " A batch counts once, however many there are." if "50_backfill" in steps else ""
    before = f"{_stopped(run)} " if _stopped(run) else ""
    return [f"{before}{count(n, 'statement')}{of}, shown below in their order with lock and undo.{least}"]


def _stopped(run: Manifest) -> str:
    """Where a plan has ended before its last step; empty where it has not."""
    at = next((p.name for p in run.phases if p.error), "")
    return at and f"The plan stopped in {at}; what comes after is not in it."


def _strongest(planned: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    locking = [s for s in planned if lock_level(s["lock"])]
    return min(locking, key=lambda s: LOCKS.index(lock_level(s["lock"])), default=None)


def _held_s(gates: Sequence[Mapping[str, Any]]) -> float:
    """How long preflight's trial held its locks on the table, all of them together; 0 where it tried none."""
    return max((float(g["figures"].get("held_s", 0)) for g in gates if g["name"].startswith("trial.")), default=0.0)


def _took_s(gates: Sequence[Mapping[str, Any]], strongest: Mapping[str, Any]) -> float | None:
    """How long statements of this lock took in preflight's trial; None where it tried none."""
    level = lock_level(strongest["lock"])
    took = [
        g["figures"]["seconds"] for g in gates if g["figures"].get("held_s") and g["figures"].get("lock") == level
    ]
    return max(took, default=None)


def _lock(
    run: Manifest, found: Newest, gates: Sequence[Mapping[str, Any]], planned: Sequence[Mapping[str, Any]]
) -> list[str]:
    strongest = _strongest(planned)
    if strongest is None:
        return [NOT_KNOWN if _stopped(run) else "None on the table."]
    lines = [f"Statement {strongest['number']} takes {strongest['lock']}. It blocks {strongest['blocks']}."]
    if (took := _took_s(gates, strongest)) is not None:
        whole = f"the trial held it for {duration(_held_s(gates))}, with all that it tried"
        lines.append(f"Tried on this table and rolled back, it took {duration(took)} ({whole}).")
    if locks := run.parameters.get("locks"):
        none = "Except for builds, which wait for older transactions to end, no" if _builds(planned) else "No"
        lines.append(
            f"{none} statement waits longer than {duration(locks['timeout_ms'] / 1000)} for its lock, since others"
            f" queue behind it; after {locks['tries']} tries it gives up and names the blocker."
        )
    if builds := [s for s in _builds(planned) if s is not strongest]:
        took_s = f", about {duration(_rehearsed_or_forecast(found, 'build_seconds'))}" if found("plan") else ""
        lines.append(
            f"Held longest, for the whole build{took_s}: {lock_level(builds[0]['lock'])}, which blocks"
            f" {builds[0]['blocks']}."
        )
    return lines


def _builds(planned: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [s for s in planned if "whole build" in s["lock"]]


def _room(found: Newest, gates: Sequence[Mapping[str, Any]]) -> list[str]:
    plan = found("plan")
    f: Mapping[str, Any] = plan.body["forecast"] if plan else {}
    parts = ", ".join(f"{what} {size(f[key])}" for key, what in DISK.items() if key in f)
    free = _found(gates, "preflight.disk_holds_it")
    memory = _found(gates, "preflight.memory_fits_index")
    lines = [
        f"Disk: {parts}{f'; {free}' if free else ''}.",
        f"WAL: {size(f['wal_bytes'])}, more with each checkpoint.",
    ]
    return [*lines, *([f"Memory: {memory} ({_allowed(gates)})."] if memory else [])]


def _found(gates: Sequence[Mapping[str, Any]], name: str) -> str:
    return next((g["found"] for g in gates if g["name"] == name), "")


def _allowed(gates: Sequence[Mapping[str, Any]]) -> str:
    figures: Mapping[str, Any] = next((g["figures"] for g in gates if g["name"] == "preflight.memory_fits_index"), {})
    return f"{size(figures['allowed_bytes'])} allowed" if "allowed_bytes" in figures else ""


def _rehearsed(found: Newest, key: str) -> Mapping[str, float] | None:
    rehearsal = found("rehearsal")
    return rehearsal.body["whole"].get(key) if rehearsal else None


def _seconds(found: Newest) -> float:
    """The time of load, backfill and build; by a rehearsal where there was one, at the worst that it measured."""
    return sum(_rehearsed_or_forecast(found, key) for key in TIMES)


def _rehearsed_or_forecast(found: Newest, key: str) -> float:
    plan, rehearsed = found("plan"), _rehearsed(found, key)
    return rehearsed["high"] if rehearsed else float(plan.body["forecast"].get(key, 0) if plan else 0)


def _time(run: Manifest, found: Newest) -> list[str]:
    names = [p.name for p in run.phases]
    plan, rehearsal = found("plan"), found("rehearsal")
    if takes := [f"{short(n)}: {STEPS[n].takes}" for n in names if n in STEPS and STEPS[n].takes]:
        return ["; ".join(takes) + "."]
    if plan is None or not {*names} & {*MIGRATE}:
        index = found("index")
        built = f" The index was last built in {duration(index.body['seconds'])}." if index else ""
        return [f"Not known before it is run.{built}"]

    def told(key: str) -> str:
        if r := _rehearsed(found, key):
            return f"{duration(r['low'])} to {duration(r['high'])}"
        return f"about {duration(plan.body['forecast'].get(key, 0))}"

    times = ", ".join(f"{what} {told(key)}" for key, what in TIMES.items())
    by = f"By the rehearsal of run {rehearsal.source}." if rehearsal else ELSEWHERE
    return [f"{times[0].upper()}{times[1:]}.", by.replace("PARAMS", shlex.quote(run.params_file)), NOT_IN_IT]


def _looked_at(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    holds = [g["name"] for g in gates if g["verdict"] == Verdict.WOULD_PASS]
    failed = [g["name"] for g in gates if g["verdict"] in (Verdict.FAIL, Verdict.UNKNOWN)]
    tried = sum(name.startswith("trial.") for name in holds)
    lines = [f"{count(len(holds), 'gate')} would pass, by what the database says today"]
    lines[0] += f", {tried} of them tried and rolled back." if tried else "."
    return [*lines, *([f"Not passed: {', '.join(failed)}."] if failed else [])]


def _later(run: Manifest, gates: Sequence[Mapping[str, Any]]) -> list[str]:
    steps = list(dict.fromkeys(g["phase"] for g in gates if _is_later(g)))
    if not steps:
        return [NOT_KNOWN if _stopped(run) else "Every gate was checked."]
    known = {"70_tune": "recall", "80_shadow": "relevance and latency"}
    which = ", ".join(steps) if len(steps) <= FEW else f"{len(steps)} steps, {steps[0]} to {steps[-1]},"
    told = [what for step, what in known.items() if step in steps]
    such_as = f", such as {', '.join(told)}" if told else ""
    return [f"Not known yet: what {which} {'has' if len(steps) == 1 else 'have'} to prove when carried out{such_as}."]


def _consent(run: Manifest, found: Newest, gates: Sequence[Mapping[str, Any]], *, read: bool) -> list[str]:
    lines = accepted(run, found)
    asked = [g["do"] for g in gates if g["verdict"] == Verdict.FAIL and "accept." in g["do"]]
    lines += [f"Not agreed to yet: {do}." for do in asked]
    if not read:
        return [*lines, UNREAD]
    noted = entry.body["phases"] if (entry := found("waits")) else []
    wanted = {*map(current, noted), *run.parameters.get("approval", {}).get("phases", [])}
    steps = [p.name for p in run.phases if operation_of(p.name) in wanted]
    given = {g["phase"]: g["found"] for g in gates if g["name"] == "approval.is_given" and g["verdict"] != "NOT RUN"}
    for step in steps:
        file = shlex.quote(run.params_file)
        wait = f"{step} waits for it: `runbook approve {file} {short(step)}`, by another database user."
        lines.append(f"Sign-off of {step}: {given[step]}." if step in given else wait)
    return lines if steps else [*lines, "No sign-off: approval.phases names none of these steps."]


def _back(run: Manifest) -> tuple[list[str], tuple[str, str], str]:
    names = {p.name for p in run.phases}
    if operation := next((n for n in names if n in OPERATE), ""):
        back, file = rollback_of(operation), shlex.quote(run.params_file)
        if not back:
            return [f"There is no rollback: {STEPS[operation].no_rollback}."], PLANNED, ""
        command = f"runbook operate {file} {short(operation)} --undo --execute"
        return [f"By {back}, which removes {STEPS[back].does}."], PLANNED, command
    if not names & {*MIGRATE}:
        again = next((operation_of(n) for n in names if n in UNDO_OPERATION), "the phases")
        return [f"This is a rollback. To go forward again, run {again} again."], PLANNED, ""
    steps = [n for n in UNDO if names & {*STEPS[n].rolls_back}]
    ways = ", ".join(f"{short(n)} ({STEPS[n].takes})" for n in steps)
    lines = [f"At any point, in this order: {ways}. The table is then as it was; the ledger stays."]
    return lines, PLANNED, rollbacks.command(run.params_file)


def _typed(
    run: Manifest, own: Sequence[Entry], gates: Sequence[Mapping[str, Any]]
) -> tuple[list[str], tuple[str, str], str]:
    """The command that carries out what was planned, and nothing else; and the role and server that it leads to."""
    if any(p.status != Status.PLANNED for p in run.phases):
        return ["Nothing yet: resolve what stopped the plan, then plan again."], GATES, ""
    file, names = shlex.quote(run.params_file), [p.name for p in run.phases]
    order = [g for g in gates if g["name"] == "phase.predecessor_passed" and g["verdict"] == Verdict.NOT_RUN]
    if before := [g["subject"] for g in order if g["subject"] not in names]:
        return [f"Nothing yet: {before[0]} has to pass first, and is not in this plan."], GATES, ""
    part = ""
    if run.way == "migrate":
        part += f" --from {names[0]}" if names[0] != MIGRATE[0] else ""
        part += f" --to {names[-1]}" if names[-1] != MIGRATE[-1] else ""
    command = f"runbook run {file}{part} --execute"
    if run.operation:
        undo = " --undo" if run.way != "operate" else ""
        command = f"runbook operate {file} {short(operation_of(run.operation))}{undo} --execute"
    elif run.way == "undo":
        command = rollbacks.command(run.params_file, names[-1] if names[-1] != UNDO[-1] else "")
    lines = [
        *_as_whom(run, own),
        "Nothing was carried out. This command carries it out; each step checks again and stops if a gate fails:",
    ]
    return lines, ("evidence", "parameters"), command


def _as_whom(run: Manifest, own: Sequence[Entry]) -> list[str]:
    """Whoever types the command: the role comes from the connection that the parameters name."""
    connection: Mapping[str, Any] = run.parameters.get("connection") or {}
    dsn, service = connection.get("dsn_env"), connection.get("service")
    by = f"${dsn}" if dsn else f"service {service}" if service else "the same connection"
    planned_as = roles(own)
    if not planned_as or not run.server:
        return []
    return [f"Steps run as the role that {by} names: for this plan {', '.join(planned_as)} on {run.server}."]
