"""A run that only plans: what it can know before the first change, and what it leaves. Its gates and statements go
into a file of its folder, as ledger rows. The ledger gets no row, and may not exist yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from runbook_lib.core.gates import Gate, Gates, Verdict, not_run
from runbook_lib.core.redaction import redacted
from runbook_lib.core.registry import OPERATE, UNDO_OPERATION
from runbook_lib.params import Params

FILE = "plan.jsonl"
# Of one statement that looks at what exists: plans are made again and again, on tables of any size.
LONGEST_LOOK = "60 s"
# What earlier steps of the same plan bring about; an operation has none.
KNOWN_AFTER = "known only after"
BROUGHT_ABOUT = ("phase.predecessor_passed", "phase.nothing_stands_on_it")


def on_the_way(step: str, gates: Gates) -> Gates:
    """The gates of a step's order, in a plan, where an earlier step may be in the same plan."""
    alone = step in (*OPERATE, *UNDO_OPERATION)
    names = () if alone else BROUGHT_ABOUT
    return _not_yet(gates, names, "the steps before it").in_a_plan()


def of_what_is_there(step: str, gates: Gates) -> Gates:
    """The proof of a step, checked in a plan: what does not hold today is for the step to bring about."""
    return _not_yet(gates, {g.name for g in gates}, step).in_a_plan()


def _not_yet(gates: Gates, names: Collection[str], after: str) -> Gates:
    def told(g: Gate) -> Gate:
        if g.verdict is Verdict.PASS or g.name not in names:
            return g
        return replace(g, verdict=Verdict.NOT_RUN, found=f"{g.found}; {KNOWN_AFTER} {after}")

    return Gates(tuple(map(told, gates)))


def not_there_yet(name: str, step: str, statements: int, look: Any, why: str = "") -> Gates:
    """The one gate of a check that a plan cannot run. look: its function, with a docstring that says what it proves.
    why: what ended a check that was begun.
    """
    left = f", which has {statements} statement{'s' if statements != 1 else ''} to run" if statements else ""
    proves = " ".join((look.__doc__ or "").split("\n\n")[0].split())
    return Gates((not_run(name, step, f"{why}{KNOWN_AFTER} {step}{left}", proves),))


def note(params: Params, run_id: str, step: str, role: str, kind: str, body: Mapping[str, Any]) -> None:
    """A row for the record of a run that only plans; nothing where somebody steps through by hand."""
    folder = params.record.runs_dir / run_id
    if folder.is_dir():
        of = {"run_id": run_id, "target": params.target.name, "phase": step, "written_by": role}
        row = of | {"kind": kind, "body": dict(body)}
        mode = folder.stat().st_mode & 0o644
        opened = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode)
        with os.fdopen(opened, "a", encoding="utf-8") as file:
            file.write(json.dumps(redacted(row), ensure_ascii=False, default=str) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows that a run left there; none where it carried its plan out."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
