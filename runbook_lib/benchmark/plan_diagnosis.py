"""Why a plan does not use the vector index: one thing is changed at a time, until the server would use it.

A cause is named only where changing it alone, or together with the others named, makes the plan use the index.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg

from runbook_lib.benchmark.prepared import SQL, Sent, plan_of, vector_indexes
from runbook_lib.benchmark.vector_statement import VectorSearch, casts_without_dimension, find, named
from runbook_lib.core import db, names, row_counts
from runbook_lib.core.display import number
from runbook_lib.core.names import OPERATORS, spelled
from runbook_lib.core.query_plan import QueryPlan
from runbook_lib.indexes import forecast, partitions
from runbook_lib.params import Params

# For solid-state disks; PostgreSQL's default of 4 is for spinning ones (manual, "Planner Cost Constants").
RANDOM_PAGE_COST = "1.1"
DEFAULT_RANDOM_PAGE_COST = 4.0
# Up to so many rows a scan takes milliseconds, so that the planner may prefer it.
SMALL_TABLE_ROWS = 10_000
TOO_SMALL = "table_too_small"
GENERIC = "generic_plan"
# Whatever the prices are, these make the planner take the index if it can be used at all.
CHEAP = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_sort": "off",
    "enable_indexscan": "on",
    "random_page_cost": RANDOM_PAGE_COST,
}


@dataclass(frozen=True)
class Cause:
    """Why the index is not used. found: the fact, in words. do: what to paste."""

    name: str
    found: str
    do: str


@dataclass(frozen=True)
class _Case:
    """What a diagnosis works with. index: the one that the search should use."""

    params: Params
    connection: db.Connection
    sent: Sent
    kind: str
    index: db.Row

    def plan(self, text: str, settings: dict[str, str], kind: str = "custom") -> QueryPlan | None:
        """The plan of another text under other settings; None where the server refuses it."""
        try:
            return plan_of(self.connection, self.sent.with_text(text), kind, settings)
        except psycopg.Error:
            return None

    def uses(self, text: str, settings: dict[str, str], kind: str = "custom") -> bool:
        """Would that plan read a vector index?"""
        names = {row["name"] for row in vector_indexes(self.connection, self.params)}
        found = self.plan(text, settings, kind)
        return found is not None and found.by_index in names

    def setting(self, name: str) -> db.Row:
        return db.one(self.connection, SQL["setting"], self.params, name=name)

    def paste(self, text: str) -> str:
        """The statement as the application would write it, on one line."""
        return "send instead: " + " ".join(named(text, self.sent.names).split())


def diagnose(connection: db.Connection, params: Params, sent: Sent, kind: str) -> Cause:
    """Names the cause, tested: the catalogue first, then the statement, then what the planner is told of prices."""
    found = vector_indexes(connection, params)
    if not found:
        return Cause("no_index", "there is no vector index", "run 60_build_index with execute: true")
    usable = [row for row in found if row["usable"]]
    if not usable:
        return _invalid(found[0])
    if lacking := partitions.without_index(connection, params, spelled(params, "vectors")):
        return Cause(
            "partition_without_index",
            f"no vector index on {', '.join(lacking)}",
            "run 60_build_index with execute: true; it builds what these partitions lack",
        )
    case = _Case(params, connection, sent, kind, usable[0])
    if case.uses(sent.text, CHEAP):
        return _of_price(case)
    return _of_statement(case)


def through_the_index(sent: Sent, missed: str) -> Cause:
    """A statement that reads the vector index although its filters are to be searched exactly."""
    search = find(sent.text)
    # What is not a bare distance cannot be read from the index, and is sorted exactly.
    text = search.bare(f"({search.left}", right=f"{search.right}) + 0") if search else sent.text
    return Cause("exact_was_chosen", missed, f"send instead, for these: {' '.join(named(text, sent.names).split())}")


def _invalid(row: db.Row) -> Cause:
    return Cause(
        "invalid_index",
        f"{row['name']} is invalid: a build did not finish",
        f"DROP INDEX CONCURRENTLY {row['shown']}; then run 60_build_index with execute: true",
    )


Change = tuple[str, str, Callable[[str], str | None]]


def _of_statement(case: _Case) -> Cause:
    """The index cannot serve the statement at any price: which change of the text lets it?"""
    changes = list(_changes(case))
    for name, found, change in changes:
        text = change(case.sent.text)
        if text and case.uses(text, CHEAP):
            return Cause(name, found, case.paste(text))
    text = case.sent.text
    applied: list[tuple[str, str]] = []
    for name, found, change in changes:
        if changed := change(text):
            text, applied = changed, [*applied, (name, found)]
            if case.uses(text, CHEAP):
                names, facts = zip(*applied, strict=True)
                return Cause("+".join(names), "; ".join(facts), case.paste(text))
    return Cause(
        "unknown",
        "none of the known causes: DESC, NULLS FIRST, operator, expression, cast, type, partial index",
        "compare with EXPLAIN (VERBOSE, SETTINGS) of: " + case.paste(case.sent.text).removeprefix("send instead: "),
    )


def _changes(case: _Case) -> Iterator[Change]:
    """Each cause that stands in the text: its name, the fact, and the change that takes it away."""
    search = find(case.sent.text)
    if search is None:
        return
    p, index = case.params, case.index
    column, vector_type = p.vector.column, f"{p.vector.type}({p.vector.dimension})"
    distance = OPERATORS[p.vector.distance]
    served = index["operator"] or distance
    if not case.sent.is_the_applications:
        vector_type = spelled(p, "vector_type")

    def changed(change: Callable[[VectorSearch], str]) -> Callable[[str], str | None]:
        def apply(text: str) -> str | None:
            now = find(text)
            result = change(now) if now else text
            return result if result.split() != text.split() else None

        return apply

    yield (
        "descending",
        "sorted DESC, farthest first; an index gives the nearest first",
        changed(lambda s: s.without(r"\bDESC\b")),
    )
    yield (
        "nulls_first",
        "sorted NULLS FIRST; an index holds no NULL and gives them last",
        changed(lambda s: s.without(r"\bNULLS\s+FIRST\b")),
    )
    yield (
        "wrong_operator",
        f"sorted by {search.operator}; {index['operator_class']} serves {index['operator']}",
        changed(lambda s: s.with_distance(served)),
    )
    yield (
        "partial_predicate",
        f"{index['name']} holds only rows WHERE {index['predicate']}, which the statement does not imply",
        changed(lambda s: s.filtered(index["predicate"]) if index["predicate"] else s.text),
    )
    own, other = _column_first(search, column)
    uncast = re.sub(r"::\s*[\w.]+(\s*\(\d+\))?\s*$", "", other)
    indexed = index["indexed"].replace(column, _plain(own, column))
    lacks_dimension = "halfvec(" in indexed and casts_without_dimension(own, "halfvec")
    yield (
        "cast_without_dimension",
        f"{column} is cast to halfvec without a dimension; the index is on {index['indexed']}",
        changed(lambda s: s.bare(left=indexed, right=other) if lacks_dimension else s.text),
    )
    held = names.as_indexed(p, names.verbatim(f"{uncast}::{vector_type}")).as_string()
    if case.sent.is_the_applications:
        for name in ("halfvec", "binary_quantize"):
            held = held.replace(names.of_pgvector(p, name).as_string(), name)
    held = held.replace("%%", "%")
    yield (
        "not_as_indexed",
        f"sorted by {' '.join(search.keys.split())}; the index holds {index['indexed']}"
        + (f", whose first rows must be sorted again by {distance}" if p.index.storage == "bit" else ""),
        changed(lambda s: s.bare(indexed, served, held)) if p.index.storage != "vector" else lambda _: None,
    )
    yield (
        "type_mismatch",
        f"the query's vector is {_cast_of(other) or 'of another type'}, {column} is {vector_type}:"
        " every row would be cast",
        changed(lambda s: s.ordered_by(s.keys.replace(other, f"{uncast}::{vector_type}") + "\n")),
    )
    yield (
        "expression",
        f"the distance is inside an expression, {' '.join(search.keys.split())}",
        changed(lambda s: s.bare()),
    )
    yield (
        "cast_of_column",
        f"{column} is cast, {' '.join(own.split())}; the index is on {index['indexed']}",
        changed(lambda s: s.bare(left=_plain(own, column), right=f"{uncast}::{vector_type}")),
    )


def _column_first(search: VectorSearch, column: str) -> tuple[str, str]:
    """The operand that names the column, and the other."""
    is_left = re.search(rf"\b{re.escape(column)}\b", search.left) is not None
    return (search.left, search.right) if is_left else (search.right, search.left)


def _cast_of(side: str) -> str:
    found = re.search(r"::\s*([\w.]+(?:\s*\(\d+\))?)\s*$", side)
    return found[1] if found else ""


def _plain(side: str, column: str) -> str:
    """The column alone, with the alias that the statement gives its table."""
    found = re.search(rf'(?:[\w"]+\.)*"?{re.escape(column)}"?', side)
    return found[0] if found else column


def _of_price(case: _Case) -> Cause:
    """The index can serve the statement, and the planner finds it expensive: which change lets it win?"""
    for test in (_scan_is_off, _generic, _no_limit, _probes_are_lists, _random_pages_are_dear, _other_index):
        if cause := test(case):
            return cause
    return _too_small(case)


def _scan_is_off(case: _Case) -> Cause | None:
    setting = case.setting("enable_indexscan")
    if setting["setting"] == "on" or not case.uses(case.sent.text, {"enable_indexscan": "on"}, case.kind):
        return None
    return Cause("cost_settings", f"enable_indexscan is off, set by {setting['source']}", _reset(case, setting, "on"))


def _generic(case: _Case) -> Cause | None:
    if case.kind != "generic" or not case.uses(case.sent.text, {}):
        return None
    search = find(case.sent.text)
    tail = case.sent.text[search.end :] if search else ""
    fixed = re.sub(r"\bLIMIT\s+\$\d+", f"LIMIT {case.params.queries.k}", tail, flags=re.I)
    role = case.connection.info.user
    do = f"ALTER ROLE {role} SET plan_cache_mode = force_custom_plan, {role} being the role of the application"
    if search and fixed != tail and case.uses(text := case.sent.text[: search.end] + fixed, {}, "generic"):
        do = f"{case.paste(text)}; or {do}"
    return Cause(
        GENERIC,
        "a generic plan knows neither the LIMIT nor the filter; a custom plan uses the index",
        do,
    )


def _no_limit(case: _Case) -> Cause | None:
    search, found = find(case.sent.text), case.plan(case.sent.text, CHEAP)
    if search is None or found is None or found.limited:
        return None
    text = search.limited(str(case.params.queries.k))
    if not case.uses(text, {}, case.kind):
        return None
    return Cause("no_limit", "no LIMIT: every row is asked for, in order", case.paste(text))


def _probes_are_lists(case: _Case) -> Cause | None:
    if case.index["method"] != "ivfflat":
        return None
    lists = int(case.index["lists"] or 100)
    probes = int(case.setting("ivfflat.probes")["setting"])
    fewer = forecast.probes_rule(lists)
    if probes < lists or not case.uses(case.sent.text, {"ivfflat.probes": str(fewer)}, case.kind):
        return None
    return Cause(
        "probes_are_lists",
        f"ivfflat.probes {probes} of {lists} lists: the index would read every row as well",
        f"SET ivfflat.probes = {fewer}",
    )


def _random_pages_are_dear(case: _Case) -> Cause | None:
    """Not the server's default on a small table: there a scan is cheap whatever the disks are."""
    setting = case.setting("random_page_cost")
    if float(setting["setting"]) <= DEFAULT_RANDOM_PAGE_COST and _rows(case) <= SMALL_TABLE_ROWS:
        return None
    cheaper = {"random_page_cost": RANDOM_PAGE_COST}
    if float(setting["setting"]) <= float(RANDOM_PAGE_COST) or not case.uses(case.sent.text, cheaper, case.kind):
        return None
    found = f"random_page_cost is {setting['setting']}, set by {setting['source']}: the price of spinning disks"
    return Cause("cost_settings", found, _reset(case, setting, RANDOM_PAGE_COST))


def _reset(case: _Case, setting: db.Row, value: str) -> str:
    """The statement that changes a setting where it was set."""
    name, info = setting["name"], case.connection.info
    where = {
        "database": f"ALTER DATABASE {info.dbname} SET {name} = {value}",
        "user": f"ALTER ROLE {info.user} SET {name} = {value}",
        "session": f"SET {name} = {value}",
    }
    return where.get(setting["source"], f"ALTER SYSTEM SET {name} = {value}; SELECT pg_reload_conf()")


def _other_index(case: _Case) -> Cause | None:
    found = case.plan(case.sent.text, {}, case.kind)
    if found is None or not found.by_another_index:
        return None
    return Cause(
        "another_index",
        f"exact search through {found.scan.split()[-1]} is cheaper, for it leaves few rows",
        "nothing: these answers are exact; let 70_tune decide which filters are answered so",
    )


def _rows(case: _Case) -> int:
    return row_counts.of(case.connection, case.params, "vectors").n


def _too_small(case: _Case) -> Cause:
    whole, index = case.plan(case.sent.text, {}, case.kind), case.plan(case.sent.text, CHEAP, case.kind)
    there = _rows(case)
    pages = db.one(case.connection, SQL["pages"], case.params, table=spelled(case.params, "vectors"))["pages"]
    small = there <= SMALL_TABLE_ROWS
    prices = f"{number(whole.cost)} against {number(index.cost)}" if whole and index else "less"
    return Cause(
        TOO_SMALL if small and case.setting("enable_indexscan")["setting"] == "on" else "scan_is_cheaper",
        f"{number(there)} rows in {number(pages)} pages: reading all of them is cheaper, {prices}",
        f"nothing while it is so small; if it is not, ANALYZE {spelled(case.params, 'vectors')}",
    )
