"""From one ``index.storage`` to another: the search function goes over together with the index, in one transaction.

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
from runbook_lib.core.names import WAYS_TO_ANSWER, function_of, index_name, spelled, verbatim
from runbook_lib.core.phase import Phase
from runbook_lib.search import search_function, ways
from runbook_lib.sql import load

SQL = load("rebuild")

# Ledger rows of the setting with which the new index was proved.
PROVED = "storage_proved"


def under(phase: Phase, storage: str) -> Phase:
    """The same phase, with names and statements of another storage."""
    index = phase.params.index.model_copy(update={"storage": storage})
    return replace(phase, params=phase.params.model_copy(update={"index": index}))


def changes_function(phase: Phase, serving: str) -> bool:
    """Must the search function go over too? serving: what the index holds that serves now.

    With the same storage only another ``index.rerank`` stands in its text.
    """
    if search_function.function_state(phase.connection, phase.params) is None:
        return False
    storage = phase.params.index.storage
    return serving != storage or (
        storage == "bit" and not search_function.is_as_planned(phase.connection, phase.params)
    )


def swap(phase: Phase, renames: db.Statement) -> db.Statement:
    """The renames, and the function made again, in one transaction; it carries the setting that was proved."""
    proved = phase.ledger.latest(PROVED) or {}
    known = (
        proved["settings"]
        if proved.get("run_id") == phase.run_id
        else search_function.carried_settings(phase.connection, phase.params)
    )
    return _together(renames, search_function.create_statement(phase.connection, phase.params, known).query)


def swap_back(renames: db.Statement, definition: str | None) -> db.Statement:
    """The renames back, and the former function, where it had gone over."""
    if not definition:
        return renames
    return _together(renames, sql.Composed([verbatim(definition.strip())]))


def _together(renames: db.Statement, function: sql.Composed) -> db.Statement:
    return replace(
        renames,
        purpose=f"{renames.purpose.removesuffix('.')}; the search function goes over with it.",
        query=sql.SQL(";\n").join([renames.query, function]),
    )


def definition(phase: Phase) -> str | None:
    """The search function, and those that answer for it, as they could be made again; None where there are none."""
    p = phase.params
    own = {"by_route": [function_of(p, way) for way in WAYS_TO_ANSWER], "ledger": spelled(p, "ledger")}
    called = {"schema": spelled(p, "schema"), "function": p.function_name}
    found = db.one(phase.connection, SQL["definition"], p, **called, **own)["definition"]
    return str(found) if found else None


def before(
    phase: Phase, asked: Sequence[Query], index: str, serving: str, others: list[str]
) -> index_recall.IndexRecall | None:
    """The index that serves, asked as the function of today asks it."""
    return index_recall.through(under(phase, serving), asked, index, others)


def after(
    phase: Phase, asked: Sequence[Query], index: str, needed: float, others: list[str]
) -> index_recall.IndexRecall | None:
    """The new index, with the first setting that finds as much as is needed: that of today, then higher ones.

    The setting is written down for the swap, which carries it into the function; 70_tune finds the best one.
    """
    carried = search_function.carried_settings(phase.connection, phase.params)
    name = ways.SETTING[phase.params.index.method]
    now = int(carried.get(name, 0))
    found = None
    for value in [*([now] if now else []), *(v for v in ways.candidates(phase.params) if v > now)]:
        own = ways.through_the_index(phase.params, value).settings(phase.params.index.method)
        settings = own | carried | {name: str(value)}
        found = index_recall.through(phase, asked, index, others, settings)
        if found is None:
            return None
        phase.note(PROVED, {"run_id": phase.run_id, "settings": settings, "recall": found.recall})
        if found.recall >= needed:
            break
    return found


def function_fits(phase: Phase) -> Gate:
    """Gate: the function asks for what the index holds."""
    i = phase.params.index
    fits = search_function.is_as_planned(phase.connection, phase.params)
    wanted = f"the query of index.storage: {i.storage}" + (
        f", index.rerank: {i.rerank}" if i.storage == "bit" else ""
    )
    return gate(
        "rebuild.function_searches_the_index",
        fits,
        phase.params.function_name,
        found=wanted if fits else "another query than these parameters make",
        needed=wanted,
        danger="every search would read the whole table",
        do="run 70_tune with execute: true; it creates the function again",
    )


def last_swap(phase: Phase) -> dict[str, Any]:
    """What the ledger knows of the last swap; empty where there was none, or it was rolled back since."""
    return phase.ledger.latest_standing("rebuild", "operate/rebuild_index", "60_build_index") or {}


def holds_again(phase: Phase, found: Sequence[str]) -> Gate:
    """Gate of the rollback: the index holds what it held before the last swap. found: of the index that serves."""
    needed = last_swap(phase).get("storage") or (found[0] if found else "an index")
    return gate(
        "rebuild.index_holds_what_it_held",
        list(found) == [needed],
        index_name(phase.params),
        found=", ".join(found) or "no such index",
        needed=needed,
        danger="the search function that was brought back would read the whole table",
        do="run `runbook operate PARAMS rebuild_index --undo --execute` again",
    )
