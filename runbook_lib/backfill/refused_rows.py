"""Rows that refuse the UPDATE: told from an outage, named with the server's own words, and bounded in number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import psycopg

from runbook_lib.backfill import update_effects
from runbook_lib.core import db
from runbook_lib.core.display import number
from runbook_lib.core.gates import Gate, GateFailed, Gates, gate
from runbook_lib.core.names import added_columns, changing, names, spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("backfill")
T = TypeVar("T")

# Classes of SQLSTATE by which the server, or a trigger, refuses a row: data, integrity, triggered change, routines,
# WITH CHECK OPTION, PL/pgSQL; and a state that is needed first, such as a replica identity.
CLASSES = ("22", "23", "27", "38", "39", "44", "P0")
STATES = ("55000",)
# More, and it is no odd row but the table that refuses: going on would try each row on its own.
MOST_REFUSED = 20
SHOWN = 5


def is_refusal(error: psycopg.Error) -> bool:
    """Did the server refuse what was written, rather than fail to work?"""
    state = error.sqlstate or ""
    return state[:2] in CLASSES or state in STATES


def in_halves(
    params: Params, keys: Sequence[Any], write: Callable[[Sequence[Any]], T], refused: dict[Any, str]
) -> list[T]:
    """Writes these rows, a transaction for all of them; where the server refuses one, in halves until that row is
    alone and can be named: it goes into ``refused`` with the server's words. Returns what each transaction did.

    Raises GateFailed where row after row is refused.
    """
    try:
        return [write(keys)]
    except psycopg.Error as error:
        if not is_refusal(error):
            raise
        if len(keys) == 1:
            refused[keys[0]] = update_effects.said(error)
            if len(refused) > MOST_REFUSED:
                raise GateFailed(Gates((_too_many(params, dict(refused)),))) from error
            return []
    half = len(keys) // 2
    return [done for part in (keys[:half], keys[half:]) for done in in_halves(params, part, write, refused)]


def _too_many(params: Params, refused: Mapping[Any, str]) -> Gate:
    """The gate of a backfill that stops since row after row is refused."""
    key, words = next(iter(refused.items()))
    return _gate(
        params, f"{len(refused)} rows refused, and the backfill stopped; {params.target.key_shown} {key}: {words}"
    )


def gate_of_left(connection: db.Connection, params: Params) -> Gate:
    """Did every staged row whose text is still the same take its vector? Those that did not are tried once more, in a
    transaction that is rolled back, for the reason."""
    rows = connection.execute(
        SQL["refusing"].compose(names(params) | changing(params)), {"most": MOST_REFUSED}
    ).fetchall()
    keys = [r["key"] for r in rows]
    if not keys:
        return _gate(params, "", len(keys))
    some = ", ".join(str(k) for k in keys[:SHOWN]) + (" and more" if keys[SHOWN:] else "")
    return _gate(params, f"not {params.target.key_shown} {some}: {_reason(connection, params, keys)}", len(keys))


def _reason(connection: db.Connection, params: Params, keys: Sequence[Any]) -> str:
    bench = update_effects.bench(connection, params, added_columns(params))
    try:
        with db.rolled_back(connection):
            effects = update_effects.measure(bench, keys)
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        return f"PostgreSQL says: {update_effects.said(error)}"
    if effects.error:
        return f"PostgreSQL says: {effects.error}"
    if not effects.kept:
        return "they take it now; run this phase again"
    by = ", ".join(sorted(effects.fired)) or "a rule of the table"
    return f"the UPDATE leaves {number(len(effects.kept))} of {number(effects.rows)} as they are; fired: {by}"


def _gate(params: Params, found: str, rows: int | None = None) -> Gate:
    return gate(
        "backfill.every_staged_row_took_its_vector",
        not found,
        spelled(params, "table"),
        found=found or "every staged row whose text is still the same has its vector",
        needed="every such row takes its vector",
        danger="the new search never finds these rows, and no rerun changes that by itself",
        do="settle it with the owner of the trigger, rule or constraint, then run 50_backfill again; or"
        f" {update_effects.SIDE_TABLE}",
        figures={} if rows is None else {"rows": rows},
    )
