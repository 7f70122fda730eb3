"""Can searches be filtered as the parameters say? Each condition is planned, and the privileges on what it reads are
checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from runbook_lib.backfill import update_effects
from runbook_lib.core import db
from runbook_lib.core.display import some
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import indexed_rows, names, spelled, verbatim
from runbook_lib.params import Params
from runbook_lib.params.filters import Filter
from runbook_lib.params.placeholders import written
from runbook_lib.search import conditions
from runbook_lib.search.search_path import as_in_the_function
from runbook_lib.sql import load

SQL = load("filter_checks")

SHOWN = 5
# The table that the condition of an index is tried on.
PROBE_OF_INDEX = "runbook_probe_of_index"
PROBE = "runbook_probe"


@dataclass(frozen=True)
class Found:
    """What PostgreSQL makes of a condition. lacking: privileges of the application's roles."""

    problem: str = ""
    volatile: bool = False
    lacking: Sequence[db.Row] = ()


def check(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """A gate for each condition of target.filters, and for target.always; none if all filters are columns."""
    t = params.target
    asked = [(f"target.filters.{f.name}", f) for f in t.each_filter if f.column is None]
    found: list[tuple[str, Filter | None, Found]] = []
    found += [(subject, f, _looked_at(connection, params, f)) for subject, f in asked]
    if t.always:
        found.append(("target.always", None, of_condition(connection, params, names(params)["always"])))
        if params.index.rows == "always":
            yield _can_be_indexed(connection, params)
    for subject, f, seen in found:
        value = f", {written(f.name)} of type {f.type}" if f else ""
        yield gate(
            "inputs.condition_can_be_planned",
            not seen.problem,
            subject,
            found=f"PostgreSQL says: {seen.problem}" if seen.problem else "planned",
            needed=f"one condition on a row t of {spelled(params, 'table')}{value}",
            danger="every search with it would fail",
            do="try it in psql: SELECT … FROM the table t WHERE …; qualify names from other schemas",
        )
        if seen.volatile:
            yield _volatile(subject)
    if t.always or asked:
        lacking = [row for _, _, seen in found for row in seen.lacking]
        gate_name = "inputs.callers_may_read_what_filters_read"
        yield privileges(gate_name, params, lacking, "the conditions name", "searches with these filters")


def _can_be_indexed(connection: db.Connection, params: Params) -> Gate:
    problem = ""
    try:
        with as_in_the_function(connection, params):
            connection.execute(SQL["create_indexed_probe"].compose(names(params)), {}, prepare=False)
            where = {"of_rows": indexed_rows(params, PROBE_OF_INDEX)}
            connection.execute(SQL["index_probe"].compose(names(params) | where), {}, prepare=False)
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        problem = update_effects.said(error)
    return gate(
        "inputs.condition_can_be_that_of_an_index",
        not problem,
        "target.always, index.rows",
        found=f"PostgreSQL says: {problem}" if problem else "an index with this condition can be made",
        needed="a condition of IMMUTABLE functions on columns of the table",
        danger="the index could not be built, after the vectors were made",
        do="set index.rows: all; or leave out of target.always what changes by itself, such as now()",
    )


def _volatile(subject: str) -> Gate:
    return gate(
        "inputs.condition_is_stable",
        False,
        subject,
        found="a volatile function, such as random() or clock_timestamp()",
        needed="only STABLE or IMMUTABLE functions, such as now()",
        danger="the same search would match different rows each time, so recall could not be measured",
        do="leave the function out; if it is yours and changes nothing, declare it STABLE",
    )


def privileges(name: str, params: Params, lacking: Sequence[db.Row], named_by: str, failing: str) -> Gate:
    """May the callers read what the parameters' SQL reads? name, named_by, failing: for the gate."""
    said = list(dict.fromkeys(f"{row['role']} lacks {row['privilege']}" for row in lacking))
    grants = list(dict.fromkeys(row["granted"] for row in lacking))
    return gate(
        name,
        not lacking,
        "search.grant_to and search.seen_as",
        found=some(said, SHOWN, "; ") or f"{len(callers(params))} roles may read it",
        needed=f"SELECT on the columns, EXECUTE on the functions that {named_by}",
        danger=f"the search function runs with its caller's privileges: their {failing} would fail",
        do=f"have their owner run: {' '.join(grants)}",
    )


def callers(params: Params) -> list[str]:
    """The roles that call the search function."""
    s = params.search
    return list(dict.fromkeys([*s.grant_to, *(caller.role for caller in s.seen_as)]))


def _looked_at(connection: db.Connection, params: Params, f: Filter) -> Found:
    try:
        with connection.transaction(force_rollback=True):
            there = db.rows(connection, SQL["type_of"], params, type=f.type)
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        return Found(update_effects.said(error))
    if not there:
        return Found(f"type {f.type} does not exist, or no value can have it")
    value = sql.SQL("NULL::{}").format(verbatim(f.type))
    return of_condition(connection, params, conditions.holds(connection, params, f, value))


def of_condition(connection: db.Connection, params: Params, condition: sql.Composable) -> Found:
    """A condition on a row ``t``, with names resolved as in the search function; rolled back."""
    parts = names(params) | {"condition": condition}
    try:
        with as_in_the_function(connection, params):
            row = connection.execute(SQL["plan"].compose(parts), {}, prepare=False).fetchone()
            connection.execute(SQL["create_probe"].compose(parts), {}, prepare=False)
            lacking = db.rows(connection, SQL["lacking"], params, roles=callers(params))
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        return Found(update_effects.said(error))
    plan = row["QUERY PLAN"][0]["Plan"] if row else {}
    return Found("", _keeps_apart(plan), lacking)


def _keeps_apart(node: Mapping[str, object]) -> bool:
    if node.get("Node Type") == "Subquery Scan" and node.get("Alias") == PROBE:
        return True
    below = node.get("Plans", [])
    return isinstance(below, list) and any(_keeps_apart(each) for each in below)
