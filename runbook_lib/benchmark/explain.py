"""Does the query that the application really sends use the index? Asked of the server, as the application asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from psycopg import sql

from runbook_lib.benchmark import plan_diagnosis, query_set, replica
from runbook_lib.benchmark.prepared import CALLS, Sent, call_prepared, plan_of, scans, settled, vector_indexes
from runbook_lib.benchmark.vector_statement import bound
from runbook_lib.core import db, table_kind
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import identifier, index_name, names, spelled
from runbook_lib.core.thresholds import at_least
from runbook_lib.indexes import partitions
from runbook_lib.params import Params
from runbook_lib.search import combined_filters, conditions, search_function, statements, ways
from runbook_lib.sql import load

SQL = load("explain")

DANGER = "every search would read the whole table"
NEVER_ARISES = ", and the server keeps to custom plans, which are cheaper"


def gates(connection: db.Connection, ledger: Ledger, params: Params) -> list[Gate]:
    """The function searches by the index, and so does each statement, by the plans that really arise: the function
    plans each call by itself (EXECUTE), what an application prepares may turn to a generic plan.
    """
    kind = table_kind.of(params)
    routes = list(dict.fromkeys(["vector", params.cut_over.route])) if kind.has_pages_here else []
    found = [_function_searches_by_index(connection, params, route) for route in routes]
    sent: list[tuple[Sent, Exactly | None]] = [(function_query(connection, params), None)]
    if params.search.application_query:
        own = application_query(connection, params)
        sent.append((own, _chosen_exact(connection, ledger, params, own)))
    with as_the_application(connection, params) as reader:
        for s, exact in sent:
            kinds = ("custom", "generic") if kind.keeps_generic_plans and s is not sent[0][0] else ("custom",)
            found += [judge(reader, params, s, k, exact) for k in kinds]
    return found


@dataclass(frozen=True)
class Exactly:
    """Filters that 70_tune chose to search exactly.

    where: the filters with their values. missed: why the vector index will not do for them; empty where it was
    measured to reach the target with the settings of the function.
    """

    where: str
    missed: str


def function_query(connection: db.Connection, params: Params) -> Sent:
    """The vector query of the search function, with its LIMIT bound."""
    p = params
    text = statements.route_statement(connection, p, "vector", in_function=True)
    types = conditions.types(connection, p)
    return Sent(
        f"the vector query of {p.function_name}",
        text.as_string(connection).replace("%%", "%"),
        ("query", "embedding", "k", *p.target.filters),
        (*_values(p), *[None] * len(p.target.filters)),
        ("text", "real[]", "integer", *(types[c] for c in p.target.filters)),
    )


def application_query(connection: db.Connection, params: Params) -> Sent:
    """The statement of ``search.application_query``, each filter with the value that its column holds most often."""
    p = params
    text, used = bound(str(p.search.application_query), ["query", "embedding", "k", *p.target.filters])
    known: dict[str, Any] = dict(zip(("query", "embedding", "k"), _values(p), strict=True))
    known |= {c: _usual_value(connection, p, c) for c in p.target.filter_columns if c in used}
    known |= dict.fromkeys(name for name in p.target.filters if name not in known)
    return Sent("the application's query", text, tuple(used), tuple(known[name] for name in used))


def _values(params: Params) -> tuple[str, list[float], int]:
    (query,) = query_set.with_vectors(params, query_set.sample(query_set.read_queries(params), 1))
    return query.text, [float(x) for x in query_set.vector_of(query)], params.queries.k


def _chosen_exact(connection: db.Connection, ledger: Ledger, params: Params, sent: Sent) -> Exactly | None:
    """The filters of the statement with their values, where 70_tune chose to search these exactly."""
    given = {
        c: v for c, v in zip(sent.names, sent.values, strict=True) if c in params.target.filters and v is not None
    }
    columns = [c for c in params.target.filters if c in given]
    if not columns:
        return None
    value = combined_filters.given_value([sql.Placeholder(c) for c in columns])
    query = SQL["way_of"].compose(names(params) | {"value": value})
    row = connection.execute(query, given | {"filter": combined_filters.name(columns)}).fetchone()
    if row is None or row["scan"] != "exact":
        return None
    return Exactly(
        combined_filters.AND.join(f"{c} = {given[c]}" for c in columns),
        _missed(ledger, params, columns, row["value"]),
    )


def _missed(ledger: Ledger, params: Params, columns: list[str], value: str) -> str:
    """What 70_tune found of these filters through the index, set as the function sets it for no filter at all."""
    tuning = ledger.latest("tuning") or {"chosen": None, "classes": []}
    limit = ways.MOST_SCANNED_DEFAULT[params.index.method]
    way = ("index", tuning["chosen"], ways.ITERATIVE[params.index.method][1], limit)
    own = [
        c
        for c in tuning["classes"]
        if c["column"] == combined_filters.name(columns) and value in (c["shares"] or [value])
    ]
    for point in (p for c in own for p in c["points"]):
        if (point["scan"], point["candidates"], point["iterative_scan"], point["most_scanned"]) == way:
            target = params.tune.target_recall
            reached = at_least(min(point["low"], point["worst"]), target) and not point["rows_short"]
            return "" if reached else f"the index finds {point['recall']:.3f} of their answers"
    return "what the index finds of their answers was not measured"


def _usual_value(connection: db.Connection, params: Params, column: str) -> str | None:
    query = SQL["usual_value"].compose(names(params) | {"column": identifier(column)})
    row = connection.execute(query, {}).fetchone()
    return row["value"] if row else None


@contextmanager
def as_the_application(connection: db.Connection, params: Params) -> Iterator[db.Connection]:
    """A fresh connection with the settings that the searches of the function have, which sway the planner."""
    state = search_function.function_state(connection, params)
    with replica.connect(connection, params, "plans") as reader:
        carried = dict(setting.split("=", 1) for setting in (state["settings"] or [] if state else []))
        carried.pop("search_path", None)
        with settled(reader, params, carried):
            yield reader


def judge(connection: db.Connection, params: Params, sent: Sent, kind: str, exact: Exactly | None = None) -> Gate:
    """Gate: the plan of this statement reads a vector index below a LIMIT; otherwise it names the cause.

    exact: filters of the statement that are to be searched exactly; their own index will do then, and the vector
    index only where it was measured to find enough.
    """
    indexes = {row["name"] for row in vector_indexes(connection, params)}
    found = plan_of(connection, sent, kind)
    lacking = partitions.without_index(connection, params, spelled(params, "vectors"))
    through = found.by_index in indexes and found.limited and not (found.sorted_whole and lacking)
    danger, cause = DANGER, None
    own = f"an index of the filter, for 70_tune chose exact where {exact.where}" if exact else ""
    vector = f"Index Scan {index_name(params)}" if exact is None or not exact.missed else ""
    if through and exact and exact.missed:
        cause, danger = (
            plan_diagnosis.through_the_index(sent, exact.missed),
            "the index hides rows that exact search finds",
        )
    elif not through and not (exact and found.by_another_index):
        cause = plan_diagnosis.diagnose(connection, params, sent, kind)
        if found.by_index in indexes and not found.limited:
            danger = "the index ends after some rows; the rest is never returned"
    holds = cause is None or cause.name == plan_diagnosis.TOO_SMALL or _never_arises(connection, cause, indexes, sent)
    return gate(
        f"explain.{kind}_plan_uses_the_index",
        holds,
        sent.subject,
        found=found.scan
        if cause is None
        else f"{found.scan}; {cause.found}"
        + (NEVER_ARISES if holds and cause.name == plan_diagnosis.GENERIC else ""),
        needed=", or ".join(filter(None, (vector, own))),
        danger=danger,
        do=cause.do if cause else "",
        figures={"cause": cause.name if cause else None, "cost": found.cost},
    )


def _never_arises(connection: db.Connection, cause: plan_diagnosis.Cause, indexes: set[str], sent: Sent) -> bool:
    """Does the server keep to custom plans where it chooses by itself? Not where it is told to take generic ones."""
    if cause.name != plan_diagnosis.GENERIC:
        return False
    told = connection.execute("SELECT current_setting('plan_cache_mode') AS mode").fetchone()
    if told is None or told["mode"] == "force_generic_plan":
        return False
    return plan_of(connection, sent, "auto").by_index in indexes


def call_function(
    connection: db.Connection, params: Params, route: str, given: Mapping[str, str] | None = None
) -> None:
    """Calls the function by a route, prepared, wherever reads go now.

    given: values of filters, bound as well: a generic plan of the caller does not know them.
    """
    given = given or {}
    types = conditions.types(connection, params)
    filters = [
        sql.SQL(", {} => ${}").format(identifier(f"filter_{c}"), sql.SQL(str(i))) for i, c in enumerate(given, 4)
    ]
    call = sql.SQL("SELECT * FROM {}($1, $2, $3{})").format(names(params)["function"], sql.SQL("").join(filters))
    statements.force_route(connection, params, route)
    declared = ("text", "real[]", "integer", *(types[c] for c in given))
    call_prepared(connection, declared, call, [*_values(params), *given.values()])


def _function_searches_by_index(connection: db.Connection, params: Params, route: str) -> Gate:
    """Calls the function by a route, prepared, wherever reads go now, and counts the index scans."""
    with replica.connect(connection, params, "calls") as reader:
        oids = [row["oid"] for row in vector_indexes(reader, params)]
        with reader.transaction(force_rollback=True):
            call_function(reader, params, route)
            found = scans(reader, params, oids)
    cause = None if found >= CALLS else cause_in_the_function(connection, params)
    return gate(
        "explain.function_searches_by_the_index",
        cause is None or cause.name == plan_diagnosis.TOO_SMALL,
        f"{params.function_name}, route {route}",
        found=f"{found} index scans in {CALLS} calls" + (f"; {cause.found}" if cause else ""),
        needed=f"one in each of {CALLS} calls, prepared, six with a custom and six with a generic plan",
        danger=DANGER,
        do=cause.do if cause else "",
        figures={"cause": cause.name if cause else None, "scans": found, "calls": CALLS},
    )


def cause_in_the_function(connection: db.Connection, params: Params) -> plan_diagnosis.Cause:
    """Why the vector query of the search function does not read the index, with the settings that it carries."""
    with as_the_application(connection, params) as reader:
        return plan_diagnosis.diagnose(reader, params, function_query(reader, params), "custom")
