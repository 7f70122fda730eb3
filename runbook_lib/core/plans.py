"""The statements that each phase would carry out: for the sign-off, and for the record of a run that only plans.

A run that carries nothing out leaves no row in the ledger, which may not even be there: its gates and statements go
into a file of its own folder, in the shape of ledger rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runbook_lib.core import db
from runbook_lib.core.redaction import redacted

if TYPE_CHECKING:
    from runbook_lib.core.phase import Phase

FILE = "plan.jsonl"

# The functions of runbook_lib that each notebook calls for its plan, in its order; the others change nothing.
PLANS = {
    "10_baseline": ("search.search_function.plan",),
    "20_extension": ("migrate.extension.plan",),
    "30_expand_schema": ("migrate.expand_schema.plan",),
    "40_load_embeddings": ("migrate.load_embeddings.plan",),
    "50_backfill": ("migrate.backfill.plan",),
    "60_build_index": ("migrate.build_index.plan",),
    "70_tune": ("migrate.tune.plan",),
    "80_shadow": ("search.live_shadow.plan",),
    "90_cut_over": ("migrate.cut_over.plan",),
    "operate/rehearse": ("operate.rehearse.plan",),
    "operate/refresh": ("operate.refresh.plan",),
    "operate/update_extension": ("operate.update_extension.plan",),
    "operate/rebuild_index": ("operate.rebuild_index.plan",),
    "operate/compare_storage": ("operate.compare_storage.plan",),
    "operate/change_model": ("operate.model_change.plan",),
    "operate/retire_model": ("operate.retire_model.plan",),
    "operate/serve_filters": ("operate.serve_filters.plan",),
    "operate/partition_by_filter": ("operate.partition_by_filter.plan",),
    "operate/retire_legacy": ("operate.retire_legacy.plan",),
    "undo/reads": ("migrate.cut_over.undo_plan",),
    "undo/index": (
        "migrate.tune.undo_plan",
        "operate.serve_filters.undo_plan",
        "migrate.build_index.undo_plan",
    ),
    "undo/schema": ("migrate.expand_schema.undo_plan",),
    "undo/search_function": ("search.live_shadow.undo_plan", "search.search_function.undo_plan"),
    "undo/extension": ("migrate.extension.undo_plan",),
    "undo/rebuild_index": ("operate.rebuild_index.undo_plan",),
    "undo/change_model": ("operate.model_change.undo_plan",),
    "undo/serve_filters": ("operate.serve_filters.undo_plan",),
    "undo/partition_by_filter": ("operate.partition_by_filter.undo_plan",),
    "undo/retire_legacy": ("operate.retire_legacy.undo_plan",),
}


def of(phase: Phase) -> list[dict[str, str]]:
    """The statements that the phase would carry out now, as plain data."""
    statements: list[db.Statement] = []
    for name in PLANS.get(phase.name, ()):
        # By name: these modules stand above the phase, and only the one at work is needed.
        module, _, function = name.rpartition(".")
        statements += getattr(import_module(f"runbook_lib.{module}"), function)(phase)
    return db.rendered(statements, phase.connection)


def note(phase: Phase, kind: str, body: Mapping[str, Any]) -> None:
    """A row for the record of a run that only plans; nothing where somebody steps through by hand."""
    folder = phase.params.record.runs_dir / phase.run_id
    if folder.is_dir():
        row = {"run_id": phase.run_id, "target": phase.params.target.name, "phase": phase.name, "kind": kind}
        mode = folder.stat().st_mode & 0o644
        opened = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode)
        with os.fdopen(opened, "a", encoding="utf-8") as file:
            file.write(json.dumps(redacted(row | {"body": dict(body)}), ensure_ascii=False, default=str) + "\n")


def note_statements(phase: Phase) -> None:
    """A row for each statement that the phase would carry out."""
    for statement in of(phase):
        note(phase, "planned", statement)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows that a run left there; none where it carried its plan out."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
