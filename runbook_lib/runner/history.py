"""The whole migration of a target across its runs, by the ledger: where each step stands, and what was done."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from runbook_lib.core.gates import Verdict
from runbook_lib.core.registry import MIGRATE, OPERATE, STEPS, current, rollback_of
from runbook_lib.runner import figures, rollbacks
from runbook_lib.runner.figures import Entry, Figures, Newest, Tile
from runbook_lib.runner.manifest import BY_HAND, Status
from runbook_lib.runner.rollbacks import Rollback

# Kinds of rows that a run writes about itself, and not about its work.
BOOKKEEPING = ("run", "record", "notebook", "server", "waits")
APPROVALS = "approval-of-row-"


@dataclass(frozen=True)
class StepTold:
    """A phase or an operation by its newest verdict. by: the database role. run_id: empty where it never ran."""

    name: str
    verdict: str
    at: str = ""
    by: str = ""
    run_id: str = ""


@dataclass(frozen=True)
class Run:
    """What one run did. status: empty where no end was noted. by: database role, and OS user and host where they are
    known. steps: with their verdicts.
    """

    run_id: str
    status: str
    started: str
    by: str
    steps: Sequence[str]
    statements: int
    by_hand: bool


@dataclass(frozen=True)
class History:
    """Plain data of a target's page. pages: ids of the runs whose page is there."""

    target: str
    table: str
    params_file: str
    pages: Collection[str]
    steps: Sequence[StepTold]
    runs: Sequence[Run]
    sign_offs: Sequence[tuple[str, str, str, str]]
    tiles: Sequence[Tile]
    comparison: Figures | None
    rollback: Sequence[Rollback]
    operations: Sequence[str]  # to be rolled back before the migration is


def collect(
    target: str, table: str, params_file: str, entries: Iterable[Entry], pages: Collection[str] = ()
) -> History:
    """All that the target's page shows. entries: rows of every run of it, in order."""
    entries = list(entries)
    found, steps = Newest("", entries), _steps(entries)
    passed = {s.name for s in steps if s.verdict == Verdict.PASS}
    return History(
        target=target,
        table=table,
        params_file=params_file,
        pages=pages,
        steps=steps,
        runs=_runs(entries),
        sign_offs=[
            (e["phase"], e["written_by"], _when(e["written_at"]), e["body"].get("reason", ""))
            for e in entries
            if e["kind"] == "approval"
        ],
        tiles=figures.tiles(found),
        comparison=figures.comparison(found),
        rollback=rollbacks.of(passed, found, entries),
        operations=[s.name for s in reversed(steps) if s.name in passed and rollback_of(s.name)],
    )


def _steps(entries: Sequence[Entry]) -> list[StepTold]:
    """Every phase, and every operation that ever ran, in the order of the runbook."""
    newest = {current(e["phase"]): e for e in entries if e["kind"] == "phase"}
    steps = []
    for name in (*MIGRATE, *OPERATE):
        if e := newest.get(name):
            steps.append(StepTold(name, e["body"]["verdict"], _when(e["written_at"]), e["written_by"], e["run_id"]))
        elif name in MIGRATE:
            steps.append(StepTold(name, str(Verdict.NOT_RUN)))
    return steps


def _runs(entries: Sequence[Entry]) -> list[Run]:
    """Every run that left a row, newest first."""
    by_run: dict[str, list[Entry]] = {}
    for e in entries:
        if not e["run_id"].startswith(APPROVALS):
            by_run.setdefault(e["run_id"], []).append(e)
    return [_run(run_id, rows) for run_id, rows in reversed(by_run.items())]


def _run(run_id: str, rows: Sequence[Entry]) -> Run:
    told: Mapping[str, Any] = next(
        (e["body"].get("manifest") or {} for e in reversed(rows) if e["kind"] == "record"), {}
    )
    last: Mapping[str, Any] = next((e["body"] for e in reversed(rows) if e["kind"] == "run"), {})
    # What is rolled back is noted in the name of the step that it was.
    done = {
        current(e["phase"]): "rolled back" if e["body"]["verdict"] == "UNDONE" else e["body"]["verdict"]
        for e in rows
        if e["kind"] == "phase"
    }
    begun = {current(e["phase"]): "not closed" for e in rows if e["kind"] not in BOOKKEEPING}
    steps = {name: verdict for name, verdict in (begun | done).items() if name in STEPS}
    status = told.get("status") or last.get("status", "")
    roles = sorted({e["written_by"] for e in rows if e["kind"] != "approval"})
    user, host = (told.get(key) or last.get(key, "") for key in ("user", "host"))
    person = f" ({user}@{host})" if user and host else f" (on {host})" if host else ""
    return Run(
        run_id,
        status if status in set(Status) else "",
        _when(rows[0]["written_at"]),
        ", ".join(roles) + person,
        [
            f"{verdict}: {', '.join(n for n in steps if steps[n] == verdict)}"
            for verdict in dict.fromkeys(steps.values())
        ],
        sum(e["kind"] == "statement" for e in rows),
        told.get("way") == BY_HAND or run_id.endswith("-by-hand"),
    )


def _when(at: datetime | str) -> str:
    return at.isoformat() if isinstance(at, datetime) else at
