"""While a backfill goes page by page: let the server tidy a page as soon as the next row wants its room.

A page that is read is pruned only once less of it is free than the larger of a tenth and what fillfactor asks to be
left (PostgreSQL, src/backend/access/heap/pruneheap.c, heap_page_prune_opt). At fillfactor 100 a row that just does
not fit moves away although a dead one beside it has room enough. A lower fillfactor rewrites nothing; it is put back
as it was when the backfill ends, and by its undo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.display import number
from runbook_lib.core.gates import Gate, LockNotObtained, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import verbatim
from runbook_lib.core.phase import Phase, changes
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("pruning")

# On 20,000 rows of 1.1 kB, seven to a page, 79 % of the updates stayed on their page at 100, 85 % at 80 and below.
FILLFACTOR = 80
# It saves time and nothing depends on it, so nobody waits for it long.
MOST_TRIES = 3


def plan(connection: db.Connection, params: Params, parts: Sequence[str]) -> list[db.Statement]:
    """Lowers the fillfactor of these relations (as PostgreSQL spells them) where it is higher."""
    found = {part: _fillfactor(connection, params, part) for part in parts}
    return [_set(params, part, FILLFACTOR) for part, value in found.items() if (value or 100) > FILLFACTOR]


@changes
def apply(phase: Phase, parts: Sequence[str]) -> None:
    """Writes down what was there, then carries out the plan; continues without it where the table is held."""
    connection, params = phase.connection, phase.params
    statements = plan(connection, params, parts)
    if not statements:
        return
    before = {part: _fillfactor(connection, params, part) for part in parts}
    phase.note("fillfactor", {"before": before | _open(phase.ledger)})
    few = params.locks.model_copy(update={"tries": min(MOST_TRIES, params.locks.tries)})
    hurried = replace(phase, params=params.model_copy(update={"locks": few}))
    for statement in statements:
        try:
            hurried.do(statement)
        except LockNotObtained as error:
            print(f"  the fillfactor stays as it is, so fewer updates stay on their page: {error.found}")


def restore_plan(connection: db.Connection, ledger: Ledger, params: Params) -> list[db.Statement]:
    """Puts back what the backfill changed, where the database still has it."""
    changed = {
        p: v
        for p, v in _open(ledger).items()
        if db.relation_exists(connection, p) and _fillfactor(connection, params, p) != v
    }
    return [_set(params, part, value) for part, value in changed.items()]


def restore(phase: Phase) -> None:
    """Carries that out."""
    for statement in restore_plan(phase.connection, phase.ledger, phase.params):
        phase.do(statement)


def verify(connection: db.Connection, ledger: Ledger, params: Params) -> list[Gate]:
    """The fillfactor is what it was; nothing to say where the backfill never changed it."""
    before = _open(ledger)
    now = {part: _fillfactor(connection, params, part) for part in before if db.relation_exists(connection, part)}
    wrong = {part: value for part, value in now.items() if value != before[part]}
    if not before:
        return []
    return [
        gate(
            "backfill.fillfactor_is_as_before",
            not wrong,
            ", ".join(wrong or now),
            found="; ".join(f"{part}: {_said(value)}" for part, value in (wrong or now).items()),
            needed="; ".join(f"{part}: {_said(before[part])}" for part in (wrong or now)),
            danger="new pages would keep room that was not asked for, and the table would grow",
            do="run this phase again; it puts the setting back",
        )
    ]


def _said(value: int | None) -> str:
    return "not set" if value is None else number(value)


def _open(ledger: Ledger) -> dict[str, int | None]:
    """What stood there before the first change that this migration made."""
    return dict((ledger.latest("fillfactor") or {"before": {}})["before"])


def _fillfactor(connection: db.Connection, params: Params, part: str) -> int | None:
    """As set on the relation itself; None where it is not."""
    found = db.one(connection, SQL["fillfactor"], params, part=part)["fillfactor"]
    return None if found is None else int(found)


def _set(params: Params, part: str, value: int | None) -> db.Statement:
    extra = {"part": verbatim(part), "value": sql.Literal(value)}
    made = db.statement(SQL["reset" if value is None else "set"], params, extra)
    return replace(made, lock=made.lock.replace("{part}", part))
