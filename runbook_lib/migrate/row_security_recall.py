"""Recall on a table with row level security, as the application sees it.

Policies are a filter that no query names. The index finds its candidates among all rows, and those that the policies
keep back are dropped: the fewer rows a role sees, the more of its answers may be missed, and what the runbook's own
role measures says nothing about that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psycopg
from psycopg import sql

from runbook_lib.benchmark import recall_at_k, relevance_measures, replica
from runbook_lib.benchmark.prepared import use_setting
from runbook_lib.benchmark.relevance_measures import Query
from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import spelled
from runbook_lib.core.phase import Phase
from runbook_lib.core.session import register_vector
from runbook_lib.core.thresholds import apart, at_least, score
from runbook_lib.embeddings import embedding
from runbook_lib.migrate import policies
from runbook_lib.params.data import SeenAs
from runbook_lib.search import search_function
from runbook_lib.sql import load

SQL = load("policies")
EXACT_ONLY = load("tune")["exact_only"]

QUESTIONS = 50
NAME_SETTINGS = "name in search.seen_as the settings that the policies read, as the application sets them"
NAME_ROLE = "correct its name in search.grant_to or search.seen_as, or CREATE ROLE first"
DANGER = "whoever sees few rows would miss answers that an exact search of those rows finds"


def gates(phase: Phase, needed: float) -> Iterator[Gate]:
    """A gate for each caller on whom the policies of the table hold; none where it has none.

    needed: recall, 0 to 1. UNKNOWN where it cannot be measured as that caller, with the reason.
    """
    p = phase.params
    if not policies.security(phase.connection, p)["is_on"]:
        return
    named = [caller.role for caller in p.search.seen_as]
    callers = [*p.search.seen_as, *(SeenAs(role=role) for role in p.search.grant_to if role not in named)]
    if not callers:
        yield _unknown(p.function_name, "no role is named", "name the application's role in search.grant_to", needed)
    where = {"schema": spelled(p, "schema"), "table": p.target.table}
    roles = db.rows(phase.connection, SQL["subject_to_them"], p, roles=[c.role for c in callers], **where)
    gone = {r["role"] for r in roles if not r["exists"]}
    for caller in callers:
        if caller.role in gone:
            yield _unknown(str(caller), "there is no such role", NAME_ROLE, needed)
    subject = {r["role"] for r in roles if r["is_subject"]}
    asked = [caller for caller in callers if caller.role in subject]
    queries = relevance_measures.sample(relevance_measures.read_queries(p), QUESTIONS)
    vectors = np.asarray(embedding.query_vectors(p, queries)) if asked else None
    for caller in asked:
        assert vectors is not None
        yield _measured(phase, caller, queries, vectors, needed)


def _measured(phase: Phase, caller: SeenAs, queries: list[Query], vectors: np.ndarray, needed: float) -> Gate:
    p = phase.params
    try:
        exact, got = replica.again(p, lambda: _asked(phase, caller, queries, vectors))
    except psycopg.Error as error:
        db.raise_if_lost(phase.connection, error)
        lacks = isinstance(error, psycopg.errors.InsufficientPrivilege)
        do = _grants(phase, caller) if lacks else NAME_SETTINGS
        return _unknown(str(caller), f"PostgreSQL says: {str(error).splitlines()[0]}", do, needed)
    nearest = [recall_at_k.of_rows(exact.rows(q.query_id), p.vector.distance) for q in queries]
    if not any(n.keys for n in nearest):
        return _unknown(str(caller), "this role sees no row with a vector", NAME_SETTINGS, needed)
    rows = [got.rows(q.query_id) for q in queries]
    recall, short = recall_at_k.recall(nearest, rows), recall_at_k.short(nearest, rows)
    shown, least = apart(recall, needed, score)
    return gate(
        "policies.recall_holds_for_callers",
        at_least(recall, needed) and not short,
        str(caller),
        found=f"recall@{p.queries.k} {shown} on {len(queries)} queries, {short} short of rows,"
        f" p95 {relevance_measures.latency(got.seconds)['p95_ms']:.2f} ms",
        needed=f"{least}, no query short of rows",
        danger=DANGER,
        do="name the column of the policies in target.filters and have the application pass it, which 70_tune then"
        " measures, and write its value into search.seen_as; or run operate/partition_by_filter on it",
        figures={"recall": recall, "short": short, "queries": len(queries)},
    )


def _grants(phase: Phase, caller: SeenAs) -> str:
    role, own = (sql.Identifier(name).as_string() for name in (caller.role, phase.connection.info.user))
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


def _asked(
    phase: Phase, caller: SeenAs, queries: list[Query], vectors: np.ndarray
) -> tuple[search_function.Answers, search_function.Answers]:
    """Exact answers among the rows that the caller sees, and those of the search function, both as that caller."""
    p = phase.params
    all_rows = search_function.route_statement(phase.connection, p, "vector", scan="exact")
    call = search_function.filtered_call_statement(phase.connection, p)
    with replica.connect(phase, "policies") as connection:
        register_vector(connection)
        with _as(connection, caller):
            connection.execute(EXACT_ONLY.compose({}))
            exact = search_function.ask(connection, p, all_rows, queries, vectors, p.queries.k, caller.filters)
        with _as(connection, caller):
            search_function.force_route(connection, p, "vector")
            got = search_function.ask(connection, p, call, queries, vectors, p.queries.k, caller.filters)
    return exact, got


@contextmanager
def _as(connection: db.Connection, caller: SeenAs) -> Iterator[None]:
    """A transaction in which the session is that caller, with the caller's settings."""
    with connection.transaction(force_rollback=True):
        for name, value in {**caller.settings, "role": caller.role}.items():
            use_setting(connection, name, value, local=True)
        yield
