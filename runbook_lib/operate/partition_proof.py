"""What partitions do for a filtered search: measured before and after, and which of them a call touches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runbook_lib.benchmark import explain, filter_classes, partial_index_candidates, replica
from runbook_lib.benchmark.partial_index_candidates import Value
from runbook_lib.benchmark.prepared import CALLS
from runbook_lib.core import db
from runbook_lib.core.display import Table, share
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import spelled
from runbook_lib.core.phase import Phase
from runbook_lib.core.thresholds import apart, at_least, score
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("partition_proof")

# Values that are measured: few, since each is asked every question.
MEASURED_VALUES = 4
KIND = "partitioned"


def values(connection: db.Connection, params: Params) -> dict[Value, float]:
    """A few values of the column, from the commonest down, with the share of the rows of each."""
    column = params.partitioning.column or ""
    with replica.connect(connection, params, "values") as reader:
        shares = filter_classes.shares(reader, params, (column,))
    most_first = sorted(shares, key=lambda v: (-shares[v], v))[:MEASURED_VALUES]
    return {Value(column, v, ""): shares[v] for v in most_first}


def measure(phase: Phase, when: str) -> None:
    """Puts the questions of 70_tune to each value as the function searches it now, and writes down what came."""
    connection, params = phase.connection, phase.params
    found = values(connection, params)
    asked = partial_index_candidates.questions(connection, params, found)
    known = remembered(phase.ledger, params)
    for value in found:
        measured = partial_index_candidates.measure_now(connection, params, value, asked[value]).as_data()
        known[value.value] = known.get(value.value, {"share": found[value]}) | {when: measured}
    phase.note(KIND, {"column": params.partitioning.column, "values": known})


def remembered(ledger: Ledger, params: Params) -> dict[str, dict[str, Any]]:
    """What the ledger knows by value, of this column."""
    body = ledger.latest(KIND)
    same = body is not None and body["column"] == params.partitioning.column
    return dict(body["values"]) if body and same else {}


def shown(phase: Phase) -> Table:
    """Before and after, a row a value."""
    column, k = phase.params.partitioning.column, phase.params.queries.k
    rows = [
        (f"{column} = {value}", share(m["share"], 1), when, *partial_index_candidates.figures(m[when]))
        for value, m in remembered(phase.ledger, phase.params).items()
        for when in ("before", "after")
        if when in m
    ]
    titles = ("value", "rows", "", "way", f"recall@{k}", "rows returned", "p50", "p95", "pages")
    return Table(titles, rows, "The same held-out questions before and after, warm")


def finds_as_much(ledger: Ledger, params: Params) -> list[Gate]:
    """A gate a value: recall reaches the target, or what it was before where that was less."""
    return [_value_gate(params, value, m) for value, m in remembered(ledger, params).items() if "after" in m]


def _value_gate(params: Params, value: str, m: Mapping[str, Any]) -> Gate:
    after, before = m["after"], m.get("before")
    needed = min(params.tune.target_recall, before["recall"]) if before else params.tune.target_recall
    was = f"; before recall {before['recall']:.3f}, p50 {before['p50_ms']:.2f} ms" if before else ""
    short = before["rows_short"] if before else 0
    shown, least = apart(after["recall"], needed, score)
    return gate(
        "partitioning.search_finds_as_much",
        at_least(after["recall"], needed) and after["rows_short"] <= short,
        f"{params.partitioning.column} = {value}",
        found=f"recall {shown}, p50 {after['p50_ms']:.2f} ms, {after['rows_short']} short of rows{was}",
        needed=f"recall {least}, no more questions short of rows than before",
        danger="searches with this value would hide answers that they gave before",
        do="run 70_tune again: the partitions have indexes of their own size; or take the partitions back",
        figures={when: m[when] for when in ("before", "after") if when in m},
    )


def touched(connection: db.Connection, params: Params, value: Value, others: Sequence[str]) -> list[str]:
    """Partitions, and those of the other relations, on which calls of the function with this value take a lock.

    PostgreSQL locks no partition that it has pruned.
    """
    with db.beside(connection, params, "calls") as reader, reader.transaction(force_rollback=True):
        explain.call_function(reader, params, "vector", {value.column: value.value})
        found = db.rows(reader, SQL["touched"], params, table=spelled(params, "table"), others=list(others))
    return [row["name"] for row in found]


def function_reads_one_partition(connection: db.Connection, params: Params, others: Sequence[str]) -> Gate:
    """The search function, called with a value, looks at its partition and at nothing else."""
    found = {v: touched(connection, params, v, others) for v in values(connection, params)}
    wrong = [
        f"{v}: {', '.join(names_) or 'none'}"
        for v, names_ in found.items()
        if len(names_) != 1 or names_[0] in others
    ]
    return gate(
        "partitioning.function_reads_one_partition",
        bool(found) and not wrong,
        params.function_name,
        found="; ".join(wrong) or f"one partition for each of {len(found)} values, in {CALLS} calls, prepared",
        needed="one partition a value",
        danger="a search with a filter would read the rows of other values, or of the table that serves no more",
        do="make the function again (10_baseline), or take the partitions back (partition_by_filter --undo)",
        figures={str(v): names_ for v, names_ in found.items()},
    )
