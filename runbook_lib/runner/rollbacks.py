"""The rollbacks: what each removes, in which order they are run, and how long they take by what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from runbook_lib.core.display import duration
from runbook_lib.core.registry import STEPS, UNDO, current, short
from runbook_lib.runner.figures import Entry, Newest


class Rollback(NamedTuple):
    """One step of rolling back. phases: what it rolls back. takes: how long, and how long going forward again."""

    name: str
    phases: str
    removes: str
    takes: str


def of(passed: Collection[str], found: Newest, entries: Iterable[Entry]) -> list[Rollback]:
    """The rollbacks of these phases, in the order in which they are run."""
    entries = list(entries)
    return [
        Rollback(
            name,
            ", ".join(p for p in STEPS[name].rolls_back if p in passed),
            STEPS[name].does,
            _takes(name, found, entries),
        )
        for name in UNDO
        if set(passed) & set(STEPS[name].rolls_back)
    ]


def command(params_file: str, to: str = "") -> str:
    """The command that rolls back up to a step, or everything."""
    until = f" --to {short(to)}" if to else ""
    return f"runbook undo {shlex.quote(params_file)}{until} --execute"


def _takes(name: str, found: Newest, entries: Sequence[Entry]) -> str:
    """How long a rollback takes, and what would have to be done again afterwards, by the times of this migration."""
    index, backfill, load = found("index"), found.backfill(), found("load")
    again = {
        "undo/index": [("building it again", index)],
        "undo/schema": [("embedding and loading again", load), ("backfilling again", backfill)],
    }
    known = [f"{what} took {duration(e.body['seconds'])}" for what, e in again.get(name, ()) if e]
    return "; ".join([_measured(name, entries) or STEPS[name].takes, *known])


def _measured(name: str, entries: Sequence[Entry]) -> str:
    """How long its statements took when it was last run on this target; empty where it never was."""
    rows = [e for e in entries if e["kind"] == "statement" and current(e["phase"]) == name]
    last = [e["body"]["seconds"] for e in rows if e["run_id"] == rows[-1]["run_id"]]
    return f"{duration(sum(last))}, measured in run {rows[-1]['run_id']}" if rows else ""
