"""Proof that the backfill changed nothing else: rows compared within the transaction that gives them their vectors.

The rows are locked between the two looks, so whatever differs was done by this very transaction: a writer at work on
the table raises no false alarm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runbook_lib.backfill import hooks, update_effects, vector_store
from runbook_lib.core import db, table_kind
from runbook_lib.core.display import number
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import added_columns, spelled
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params

KIND = "untouched"
AGREED = "agreed_effects"
# Rows of one batch that are compared.
ROWS_A_BATCH = 20
# One batch in so many is compared, the first of each worker among them.
EVERY = 10


@dataclass
class Compared:
    """What was seen so far. columns: rows that changed, by column; written: other relations that were written."""

    rows: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    written: set[str] = field(default_factory=set)


@dataclass
class Witness:
    """One worker's looks: ``before`` and ``after`` the UPDATE, in its transaction."""

    bench: update_effects.Bench
    seen: Compared
    batches: int = 0
    looked: update_effects.Looked | None = None

    def before(self, keys: Sequence[Any]) -> None:
        """Locks and looks at a few rows of one batch in :data:`EVERY`."""
        self.looked = None
        if self.batches % EVERY == 0:
            free = self.bench.rows("lock_rows", keys=list(keys[:ROWS_A_BATCH]))
            self.looked = update_effects.look_at(self.bench, [r["key"] for r in free])

    def after(self) -> None:
        """Looks at the same rows again; what deferred triggers do is part of it."""
        self.batches += 1
        if self.looked:
            self.bench.connection.execute("SET CONSTRAINTS ALL IMMEDIATE", prepare=False)
            now = update_effects.look_at(self.bench, list(self.looked))
            self.seen.rows += len(self.looked)
            self.seen.columns += update_effects.changed_columns(self.bench, self.looked, now)
            self.seen.written |= update_effects.written_elsewhere(self.bench)


def witness(connection: db.Connection, params: Params, seen: Compared) -> Witness | None:
    """For one worker; None where no row of the table is updated, or rows cannot be looked at by one server."""
    if not table_kind.of(params).has_pages_here or not vector_store.of(params).columns(params):
        return None
    return Witness(update_effects.bench(connection, params, added_columns(params)), seen)


def note(phase: Phase, seen: Compared) -> None:
    """Adds what was seen to what earlier attempts saw: figures and names, no value of any row."""
    if not seen.rows:
        return
    last = phase.ledger.latest_standing(KIND, "30_expand_schema") or {}
    phase.note(
        KIND,
        {
            "rows": last.get("rows", 0) + seen.rows,
            "columns": dict(Counter(last.get("columns", {})) + seen.columns),
            "written": sorted({*last.get("written", ()), *seen.written}),
        },
    )


def note_agreed(phase: Phase, effects: update_effects.Effects) -> None:
    """Writes down what the trial before the backfill saw, all of it agreed to by name."""
    if effects.touches:
        written = sorted(where.removeprefix("in ") for _, where in effects.written)
        phase.note(AGREED, {"columns": sorted(effects.columns), "written": written})


def verify(connection: db.Connection, ledger: Ledger, params: Params) -> list[Gate]:
    """Nothing but the runbook's columns was changed, or the triggers and rules that do so are agreed to by name."""
    found = ledger.latest_standing(KIND, "30_expand_schema")
    if not found:
        return []
    agreed = ledger.latest_standing(AGREED, "30_expand_schema") or {"columns": [], "written": []}
    there = hooks.look(connection, params)
    accepted = [h for h in there if h.accepted(params)]
    beyond = {*found["columns"]} - {*agreed["columns"]} | {*found["written"]} - {*agreed["written"]}
    # What a trigger that is agreed to does to one row in a thousand is agreed to as well, unless another may do it.
    others = len(accepted) < len(there) or not accepted
    parts = [f"{column} changed in {number(n)}" for column, n in sorted(found["columns"].items())]
    parts += [f"{relation} was written" for relation in found["written"]]
    by = f"; agreed to: {', '.join(str(h) for h in accepted)}" if parts and accepted else ""
    return [
        gate(
            "backfill.nothing_else_was_touched",
            not (beyond and others),
            spelled(params, "table"),
            found=f"{number(found['rows'])} rows compared in the transactions that gave them their vectors: "
            + ("; ".join(parts) or "no other column changed, nothing else was written")
            + by,
            needed="no other column changed and nothing else written, or agreed to by name",
            danger="a trigger or a rule acted on every row that took its vector, and preflight did not see it",
            do="find out which did: `runbook check` tries them one by one; then put right what it did",
            figures=dict(found),
        )
    ]
