"""What a reviewer must see of a run, collected as plain data from its manifest and the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from runbook_lib.core.db import lock_level
from runbook_lib.core.gates import STOPPING, Verdict
from runbook_lib.runner import approver, figures, questions, rollbacks
from runbook_lib.runner.figures import Entry, Figures, Newest, Picture, Tile
from runbook_lib.runner.manifest import BY_HAND, Manifest, Status
from runbook_lib.runner.questions import Moved, Question
from runbook_lib.runner.rollbacks import Rollback


@dataclass(frozen=True)
class Texts:
    """What the ledger does not hold and a reader wants to see: queries by their id, beginnings of rows by key."""

    queries: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordPage:
    """Plain data of one run: all that its page shows."""

    manifest: Manifest
    questions: Sequence[Question]
    tiles: Sequence[Tile]
    moved: Sequence[Moved]
    phases: Sequence[Mapping[str, Any]]
    gates: Sequence[Mapping[str, Any]]
    statements: Sequence[Mapping[str, Any]]
    planned: Sequence[Mapping[str, Any]]
    pictures: Sequence[Picture]
    comparison: Figures | None
    tables: Sequence[tuple[str, Figures]]
    forecast: Sequence[tuple[str, str, str, str]]
    rollback: Sequence[Rollback]
    later: Figures | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def collect(
    run: Manifest,
    entries: Iterable[Entry],
    pages: Iterable[str] = (),
    notes: Sequence[str] = (),
    texts: Texts | None = None,
) -> RecordPage:
    """All that the page shows, from the manifest and the target's ledger.

    entries: rows of every run of this target, in order. pages: phases whose notebook has a page. Figures that this
    run did not measure come from the newest run that did, named as their source, unless they were undone since.
    notes: why the ledger could not be read.
    """
    entries, texts = list(entries), texts or Texts()
    own = [e for e in entries if e["run_id"] == run.run_id]
    gates = _gates(own)
    found = Newest(run.run_id, entries)
    # Of an operation or a rollback, figures of other runs say nothing of what it does.
    shown = found if run.way in ("migrate", BY_HAND) else Newest(run.run_id, own)
    done = run.execute and run.way in ("migrate", BY_HAND)
    passed = {p.name for p in run.phases if p.status == Status.PASSED} if done else set()
    rollback = rollbacks.of(passed, found, entries)
    head = next((e["hash"] for e in reversed(entries) if e.get("hash")), "")
    planned = [
        s | {"undone_by": approver.undone_by(s["phase"], s["undo"])}
        for s in _folded(e for e in own if e["kind"] == "planned")
    ]
    asked = (
        questions.answer(run, found, own, gates, rollback, head, read=not notes)
        if run.execute
        else approver.answer(run, found, own, planned, read=not notes)
    )
    return RecordPage(
        manifest=run,
        questions=asked,
        tiles=figures.tiles(found) if run.execute else approver.tiles(run, found, own, planned),
        later=None if run.execute else approver.later(own),
        moved=questions.moved(shown, texts.queries, texts.rows),
        phases=_phases(run, gates, set(pages)),
        gates=gates,
        statements=_folded(e for e in own if e["kind"] == "statement"),
        planned=planned,
        pictures=figures.drawn(shown),
        comparison=figures.comparison(shown),
        tables=figures.tables(shown),
        forecast=figures.forecast(found) if run.execute or any(e["kind"] == "plan" for e in own) else [],
        rollback=rollback,
        notes=[*run.notes, *notes],
    )


def _folded(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Statements in their order; repetitions of one, such as the batches of a backfill, as a single line.

    number: of the first, from 1. times: how many it stands for. seconds and rows are added up, sql is that of the
    first. waited_for: does its lock keep others from the whole table?
    """

    def alike(statement: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(statement.get(key) for key in ("phase", "purpose", "lock", "undo"))

    lines: list[dict[str, Any]] = []
    for _, group in groupby(({"phase": e["phase"]} | dict(e["body"]) for e in entries), key=alike):
        same = list(group)
        rows = [s["rows"] for s in same if s.get("rows", -1) >= 0]
        added = {
            "number": sum(line["times"] for line in lines) + 1,
            "times": len(same),
            "waited_for": lock_level(same[0]["lock"]) not in ("", "ROW EXCLUSIVE"),
            "seconds": sum(s.get("seconds", 0.0) for s in same),
            "rows": sum(rows) if rows else -1,
            "tries": max(s.get("tries", 1) for s in same),
        }
        lines.append(same[0] | added)
    return lines


def _gates(own: Sequence[Entry]) -> list[dict[str, Any]]:
    """Gates grouped by phase, in the order of the run; of a gate judged twice the newer verdict."""
    by_phase: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for e in own:
        if e["kind"] == "gate":
            by_phase.setdefault(e["phase"], {})[(e["body"]["name"], e["body"]["subject"])] = e["body"]
    groups = []
    for phase, gates in by_phase.items():
        stopping = [g for g in gates.values() if g["verdict"] in STOPPING]
        others = [g for g in gates.values() if g not in stopping]
        passed, would = (sum(g["verdict"] == v for g in others) for v in (Verdict.PASS, Verdict.WOULD_PASS))
        groups.append({"phase": phase, "stopping": stopping, "others": others, "passed": passed, "would": would})
    return sorted(groups, key=lambda group: not group["stopping"])


def _phases(run: Manifest, gates: Sequence[Mapping[str, Any]], pages: set[str]) -> list[dict[str, Any]]:
    kind = "passed" if run.execute else "would"
    stopping = {g["phase"]: g["stopping"] for g in gates}
    count = {g["phase"]: f"{g[kind]} of {len(g['stopping']) + len(g['others'])}" for g in gates}
    return [
        vars(p)
        | {
            "gates": count.get(p.name, ""),
            # Of a notebook that a gate has stopped, its error says no more than these.
            "stopping": stopping.get(p.name, ()) if p.error and p.status == Status.FAILED else (),
            "page": f"{p.file}.html" if p.name in pages else "",
        }
        for p in run.phases
    ]
