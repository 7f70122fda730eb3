"""Phases of which a test says that their gates have passed: for tests of what a step does once it may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from runbook_lib.core import db
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params


def opened(params: Params, name: str = "50_backfill", *, execute: bool = True) -> Phase:
    """A phase of a run of its own, with a ledger; to be ended by the test."""
    ledger = Ledger(db.connect(params, f"test {name} ledger"), params, "test-run", name)
    ledger.create()
    return gates_passed(Phase(name, "test-run", execute, params, db.connect(params, f"test {name}"), ledger))


@contextmanager
def opened_for_a_while(params: Params, name: str = "50_backfill") -> Iterator[Phase]:
    """The same on a ledger that is there already, ended with the block."""
    with db.connect(params, "test ledger") as connection, db.connect(params, "test") as work:
        ledger = Ledger(connection, params, "test-run", name)
        yield gates_passed(Phase(name, "test-run", True, params, work, ledger))


def gates_passed(phase: Phase) -> Phase:
    """The phase as after a ``require()`` that passed, without asking the ledger; its session is read-only as ever."""
    phase.order.fence(phase.connection)
    phase.order.required = True
    return phase


def write(phase: Phase, statement: Any, values: Any = None) -> psycopg.Cursor[db.Row]:
    """What a test itself changes on a phase's session, past the fence that keeps the library from it."""
    with phase.order.lifted(phase.connection):
        return phase.connection.execute(statement, values)
