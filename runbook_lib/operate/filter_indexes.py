"""Values of filters with a vector index of their own: which have one, which are to, what the ledger knows of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runbook_lib.benchmark import partial_index_candidates
from runbook_lib.benchmark.partial_index_candidates import Value
from runbook_lib.core import db
from runbook_lib.core.display import Table, size
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import digits, index_name, shortened, spelled
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("filters")

# What the ledger keeps of a value is one row for all of them, so that the newest says everything.
KIND = "filters"


def name_of(params: Params, value: Value) -> str:
    """Name of a value's index: that of the vector index, and a hash of column and value."""
    return shortened(index_name(params), "_" + digits(f"{value.column}\0{value.value}"))


def made(connection: db.Connection, ledger: Ledger, params: Params) -> dict[str, db.Row]:
    """The indexes of this operation, whole or left over, by name."""
    found = db.rows(connection, SQL["standing"], params, vectors=spelled(params, "vectors"))
    known = {name_of(params, v) for v in partial_index_candidates.called_for(ledger, params)} | set(
        remembered(ledger)
    )
    return {row["name"]: row for row in found if row["name"] in known}


def remembered(ledger: Ledger) -> dict[str, dict[str, Any]]:
    """What the ledger knows of each index of this operation, by its name."""
    body = ledger.latest(KIND)
    return dict(body["indexes"]) if body else {}


def remember(phase: Phase, name: str, **known: Any) -> None:
    """Adds to what the ledger knows of an index."""
    before = remembered(phase.ledger)
    phase.note(KIND, {"indexes": before | {name: before.get(name, {}) | known}})


def wanted(connection: db.Connection, ledger: Ledger, params: Params) -> dict[str, Value]:
    """Values that are to have an index, by its name. Those that are served stay where the parameters name none:
    tuned again with its index there, a value is slow no more.
    """
    found = {name_of(params, v): v for v in partial_index_candidates.called_for(ledger, params)}
    if params.filters.partial_indexes:
        return found
    own = made(connection, ledger, params)
    served = {
        name: Value(m["column"], m["value"], "served by its index")
        for name, m in remembered(ledger).items()
        if m.get("served") and name in own and name not in found
    }
    return served | found


def standing(phase: Phase) -> Table:
    """The indexes of this operation as they are, with what an unfinished one left."""
    here = (phase.connection, phase.ledger, phase.params)
    asked = wanted(*here)
    rows = [
        (name, row["condition"], row["usable"], size(row["bytes"]), "" if name in asked else "not wanted")
        for name, row in made(*here).items()
    ]
    return Table(("index", "condition", "usable", "size", ""), rows, "partial vector indexes of the runbook")


def is_served(connection: db.Connection, ledger: Ledger, params: Params, name: str, value: Value) -> bool:
    """Is the index whole, proved before, and does the function search the value through it?"""
    known, row = remembered(ledger).get(name, {}), made(connection, ledger, params).get(name)
    return bool(
        known.get("served")
        and row
        and row["usable"]
        and is_searched_as(partial_index_candidates.strategy_of(connection, params, value), known)
    )


def is_searched_as(row: Mapping[str, Any] | None, known: Mapping[str, Any]) -> bool:
    """Does the strategy table send the value where this operation sent it?"""
    own = ("scan", "candidates", "iterative_scan", "most_scanned")
    return row is not None and row["value"] is not None and all(row[k] == known["after"][k] for k in own)
