"""From one ``index.storage`` to another: the search function is switched with the index, in one transaction.

The query must spell what the index holds. The function of today serves by the old index for as long as that has its
name; from the swap on, the new function serves by the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from psycopg import sql

from runbook_lib.benchmark import index_recall
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import WAYS_TO_ANSWER, function_of, index_name, spelled, verbatim
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.search import search_function, ways
from runbook_lib.sql import load

SQL = load("rebuild")

# Ledger rows of the setting with which the new index was proved.
PROVED = "storage_proved"


def under(params: Params, storage: str, rows: str = "") -> Params:
    """The same parameters, with names and statements of another storage. rows: in place of index.rows, if given."""
    update = {"storage": storage, "rows": rows or params.index.rows}
    return params.model_copy(update={"index": params.index.model_copy(update=update)})


def changes_function(connection: db.Connection, params: Params, serving: str) -> bool:
    """Must the search function be switched too? serving: what the index holds that serves now.

    With the same storage only another ``index.rerank`` stands in its text.
    """
    if search_function.function_state(connection, params) is None:
        return False
    storage = params.index.storage
    return serving != storage or (storage == "bit" and not search_function.is_as_planned(connection, params))


def swap(connection: db.Connection, ledger: Ledger, params: Params, renames: db.Statement) -> db.Statement:
    """The renames, and the function made again, in one transaction; it carries the setting that was proved."""
    proved = ledger.latest(PROVED) or {}
    known = (
        proved["settings"]
        if proved.get("run_id") == ledger.run_id
        else search_function.carried_settings(connection, params)
    )
    return _together(renames, search_function.create_statement(connection, params, known).query)


def swap_back(renames: db.Statement, definition: str | None) -> db.Statement:
    """The renames back, and the former function, where it had gone over."""
    if not definition:
        return renames
    return _together(renames, sql.Composed([verbatim(definition.strip())]))


def _together(renames: db.Statement, function: sql.Composed) -> db.Statement:
    return replace(
        renames,
        purpose=f"{renames.purpose.removesuffix('.')}; the search function is switched with it.",
        query=sql.SQL(";\n").join([renames.query, function]),
    )


def definition(connection: db.Connection, params: Params) -> str | None:
    """The search function, and those that answer for it, as they could be made again; None where there are none."""
    own = {"by_route": [function_of(params, way) for way in WAYS_TO_ANSWER], "ledger": spelled(params, "ledger")}
    called = {"schema": spelled(params, "schema"), "function": params.function_name}
    found = db.one(connection, SQL["definition"], params, **called, **own)["definition"]
    return str(found) if found else None


def after(
    phase: Phase, asked: Sequence[Query], index: str, needed: float, others: list[str]
) -> index_recall.IndexRecall | None:
    """The new index, with the first setting that finds as much as is needed: that of today, then higher ones.

    The setting is written down for the swap, which carries it into the function; 70_tune finds the best one.
    """
    connection, params = phase.connection, phase.params
    carried = search_function.carried_settings(connection, params)
    name = ways.SETTING[params.index.method]
    now = int(carried.get(name, 0))
    found = None
    for value in [*([now] if now else []), *(v for v in ways.candidates(params) if v > now)]:
        own = ways.through_the_index(params, value).settings(params.index.method)
        settings = own | carried | {name: str(value)}
        found = index_recall.through(connection, params, asked, index, others, settings)
        if found is None:
            return None
        phase.note(PROVED, {"run_id": phase.run_id, "settings": settings, "recall": found.recall})
        if found.recall >= needed:
            break
    return found


def function_fits(connection: db.Connection, params: Params) -> Gate:
    """Gate: the function asks for what the index holds."""
    i = params.index
    fits = search_function.is_as_planned(connection, params)
    wanted = f"the query of index.storage: {i.storage}" + (
        f", index.rerank: {i.rerank}" if i.storage == "bit" else ""
    )
    return gate(
        "rebuild.function_searches_the_index",
        fits,
        params.function_name,
        found=wanted if fits else "another query than these parameters make",
        needed=wanted,
        danger="every search would read the whole table",
        do="run 70_tune with execute: true; it creates the function again",
    )


def last_swap(ledger: Ledger) -> dict[str, Any]:
    """What the ledger knows of the last swap; empty where there was none, or it was rolled back since."""
    return ledger.latest_standing("rebuild", "operate/rebuild_index", "60_build_index") or {}


def holds_again(ledger: Ledger, params: Params, found: Sequence[str]) -> Gate:
    """Gate of the rollback: the index holds what it held before the last swap. found: of the index that serves."""
    needed = last_swap(ledger).get("storage") or (found[0] if found else "an index")
    return gate(
        "rebuild.index_holds_what_it_held",
        list(found) == [needed],
        index_name(params),
        found=", ".join(found) or "no such index",
        needed=needed,
        danger="the search function that was brought back would read the whole table",
        do="run `runbook operate PARAMS rebuild_index --undo --execute` again",
    )
