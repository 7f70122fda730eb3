"""Recall on a table with row level security, as the application sees it.

Policies are a filter that no query names. The index finds its candidates among all rows, and those that the policies
keep back are dropped: the fewer rows a role sees, the more of its answers may be missed, and what the runbook's own
role measures says nothing about that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psycopg
from psycopg import sql

from runbook_lib.benchmark import loop, query_set, replica
from runbook_lib.benchmark.loop import Answers
from runbook_lib.benchmark.prepared import use
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import spelled
from runbook_lib.core.thresholds import apart, at_least, score
from runbook_lib.migrate import policies
from runbook_lib.params import Params
from runbook_lib.params.data import SeenAs
from runbook_lib.search import statements
from runbook_lib.sql import load

SQL = load("policies")
EXACT_ONLY = load("tune")["exact_only"]

QUESTIONS = 50
# A policy that lets few rows through may read most of a large table before it finds one.
FIRST_ROW_TIMEOUT = "5s"
NAME_SETTINGS = "name in search.seen_as the settings that the policies read, as the application sets them"
NAME_ANY = "name the application's role in search.grant_to"
NAME_ROLE = "correct its name in search.grant_to or search.seen_as, or CREATE ROLE first"
DANGER = "whoever sees few rows would miss answers that an exact search of those rows finds"


def gates(connection: db.Connection, params: Params, needed: float) -> Iterator[Gate]:
    """A gate for each caller on whom the policies of the table hold; none where it has none.

    needed: recall, 0 to 1. UNKNOWN where it cannot be measured as that caller, with the reason.
    """
    if not policies.security(connection, params)["is_on"]:
        return
    callers = _callers(params)
    if not callers:
        yield _unknown(params.function_name, "no role is named", NAME_ANY, needed)
    roles = _roles(connection, params, callers)
    for caller in callers:
        if not roles[caller.role]["exists"]:
            yield _unknown(str(caller), "there is no such role", NAME_ROLE, needed)
    asked = [caller for caller in callers if roles[caller.role]["is_subject"]]
    queries = query_set.sample(query_set.read_queries(params), QUESTIONS)
    queries = query_set.with_vectors(params, queries) if asked else []
    for caller in asked:
        yield _measured(connection, params, caller, queries, needed)


def can_be_measured(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """Before the start: a gate for each caller as whom recall could not be measured; none where it can.

    Each reads a row of the table, which evaluates its policies, in a transaction that is rolled back.
    """
    if not policies.security(connection, params)["is_on"]:
        return
    callers = _callers(params)
    if not callers:
        yield _cannot_be_asked(spelled(params, "table"), "row level security is on, and no role is named", NAME_ANY)
    roles = _roles(connection, params, callers)
    for caller in callers:
        if roles[caller.role]["is_subject"] and (problem := _problem(connection, params, caller)):
            yield _cannot_be_asked(str(caller), *problem)


def _problem(connection: db.Connection, params: Params, caller: SeenAs) -> tuple[str, str] | None:
    """What keeps this caller from reading a row, and what to do about it."""
    try:
        with _as(connection, caller):
            use(connection, {"statement_timeout": FIRST_ROW_TIMEOUT})
            seen = db.rows(connection, SQL["any_row"], params)
    except psycopg.errors.QueryCanceled:
        return None
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        return f"PostgreSQL says: {str(error).splitlines()[0]}", _remedy(connection, caller, error)
    return None if seen else ("this role sees no row", NAME_SETTINGS)


def _cannot_be_asked(subject: str, found: str, do: str) -> Gate:
    return gate(
        "inputs.callers_under_policies_can_be_asked",
        False,
        subject,
        found=found,
        needed="a role on which the table's policies hold, and that reads a row of it, to measure recall as",
        danger=f"{DANGER}; 70_tune would stop for it, after hours of loading",
        do=do,
    )


def _callers(params: Params) -> list[SeenAs]:
    named = [caller.role for caller in params.search.seen_as]
    return [*params.search.seen_as, *(SeenAs(role=role) for role in params.search.grant_to if role not in named)]


def _roles(connection: db.Connection, params: Params, callers: list[SeenAs]) -> dict[str, db.Row]:
    where = {"schema": spelled(params, "schema"), "table": params.target.table}
    found = db.rows(connection, SQL["subject_to_them"], params, roles=[c.role for c in callers], **where)
    return {row["role"]: row for row in found}


def _measured(connection: db.Connection, params: Params, caller: SeenAs, queries: list[Query], needed: float) -> Gate:
    try:
        got = replica.again(params, lambda: _asked(connection, params, caller, queries))
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        said = f"PostgreSQL says: {str(error).splitlines()[0]}"
        return _unknown(str(caller), said, _remedy(connection, caller, error), needed)
    found = got.recall()
    if not found.answers:
        return _unknown(str(caller), "this role sees no row with a vector", NAME_SETTINGS, needed)
    recall, short = found.mean, found.short
    shown, least = apart(recall, needed, score)
    return gate(
        "policies.recall_holds_for_callers",
        at_least(recall, needed) and not short,
        str(caller),
        found=f"recall@{params.queries.k} {shown} on {len(queries)} queries, {short} short of rows,"
        f" p95 {got.latency()['p95_ms']:.2f} ms",
        needed=f"{least}, no query short of rows",
        danger=DANGER,
        do="name the column of the policies in target.filters and have the application pass it, which 70_tune then"
        " measures, and write its value into search.seen_as; or run operate/partition_by_filter on it",
        figures={"recall": recall, "short": short, "queries": len(queries)},
    )


def _remedy(connection: db.Connection, caller: SeenAs, error: psycopg.Error) -> str:
    if not isinstance(error, psycopg.errors.InsufficientPrivilege):
        return NAME_SETTINGS
    role, own = (sql.Identifier(name).as_string() for name in (caller.role, connection.info.user))
    return f"grant {role} what it lacks; where the runbook may not act as that role: GRANT {role} TO {own};"


def _unknown(subject: str, why: str, do: str, needed: float) -> Gate:
    return gate(
        "policies.recall_holds_for_callers",
        None,
        subject,
        found=f"not measured: {why}",
        needed=f"{score(needed)}, measured as a role on which the table's policies hold",
        danger=DANGER,
        do=do,
    )


def _asked(connection: db.Connection, params: Params, caller: SeenAs, queries: list[Query]) -> Answers:
    """Answers of the search function as that caller, with the exact ones among the rows that the caller sees."""
    asked = [replace(q, allowed=tuple(caller.filters.items())) for q in queries]
    all_rows = statements.route_statement(connection, params, "vector", scan="exact")
    call = statements.filtered_call_statement(connection, params)
    with replica.connect(connection, params, "policies") as reader:
        loop.know_vectors(reader, asked)
        with _as(reader, caller):
            reader.execute(EXACT_ONLY.compose({}))
            asked = loop.ask(reader, params, all_rows, asked, params.queries.k).as_exact(params.vector.distance)
        with _as(reader, caller):
            statements.force_route(reader, params, "vector")
            return loop.ask(reader, params, call, asked, params.queries.k)


@contextmanager
def _as(connection: db.Connection, caller: SeenAs) -> Iterator[None]:
    """A transaction in which the session is that caller, with the caller's settings."""
    with connection.transaction(force_rollback=True):
        use(connection, {**caller.settings, "role": caller.role})
        yield
