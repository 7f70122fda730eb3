"""Values for measuring filters that are conditions: those of the queries, or else values of the column that the
condition compares.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db, row_counts
from runbook_lib.core.names import names, spelled, verbatim
from runbook_lib.params import Params
from runbook_lib.params.filters import Filter, pieces
from runbook_lib.search import combined_filters, conditions, share_classes
from runbook_lib.sql import load

SQL, AT_MOST = load("filter_values"), load("recall")["at_most"]

Allowed = tuple[tuple[str, str], ...]

# Queries measured per class: half of them tune it, the others are held out.
VALUES = 8
# Of several filters: so many for each set of them, one to tune and one held out, and so many in all.
OF_A_SET, VALUES_OF_SETS = 2, 16
# How long a row that filters let through is looked for: by one candidate, and by all of them. Where there is none, or
# hardly one, a large table would be read whole each time.
LONGEST_LOOK_S, LOOKED_FOR_S = 1.0, 60.0
# Candidates drawn for several filters together, and rows sampled for a column's values.
DRAWN, SAMPLED_ROWS = 600, 100_000
# Values taken of each frequency, and sizes of the sets made of them.
OF_A_FREQUENCY, SETS = 6, (1, 2, 4, 16)
# Shares at which an ordered column is cut; a few per class.
CUTS = (
    *(0.0001, 0.0002, 0.0005, 0.0008, 0.0015, 0.0025, 0.005, 0.008, 0.015, 0.025, 0.05, 0.08, 0.15, 0.25),
    *(0.4, 0.6, 0.8, 0.95, 1.0),
)

NAME = r'(?:"(?:[^"]|"")+"|[^\W\d]\w*)'
COLUMN = rf"(?P<alias>{NAME})\s*\.\s*(?P<column>{NAME})(?:\s*::\s*[\w.\[\]]+)?"
VALUE = ":value:"
ORDERED, ARRAYS = ("<", "<=", ">", ">="), ("@>", "&&")
OPERATOR = r"(?P<operator><=|>=|<|>|=|@>|&&)"
AFTER = re.compile(rf"{COLUMN}\s*{OPERATOR}\s*(?P<any>(?:ANY|any|Any)\s*\(\s*)?{VALUE}")
BEFORE = re.compile(rf"{VALUE}\s*(?P<operator><=|>=|<|>|=|<@|&&)\s*(?P<any>)\(?{COLUMN}")
TURNED = {"<=": ">=", ">=": "<=", "<": ">", ">": "<", "<@": "@>"}
KEYWORDS = r"(?!(?:WHERE|ON|JOIN|INNER|LEFT|CROSS|GROUP|ORDER|LIMIT)\b)"
RELATION = rf"\b(?:FROM|JOIN)\s+(?:ONLY\s+)?(?P<relation>{NAME}(?:\s*\.\s*{NAME})?)"


@dataclass(frozen=True)
class Compared:
    """What a condition compares with its value: a column of a relation, both in SQL's spelling, and the operator.

    any: with the elements of the value. ours: the relation is the target.
    """

    relation: str
    column: str
    operator: str
    any: bool
    ours: bool


def compared(f: Filter, table: str) -> Compared | None:
    """What the condition of a filter compares with its value; None if its text does not show that."""
    text = "".join(VALUE if is_name else piece for is_name, piece in pieces(f))
    if match := AFTER.search(text):
        operator = match["operator"]
    elif match := BEFORE.search(text):
        operator = TURNED.get(match["operator"], match["operator"])
    else:
        return None
    alias = _unquoted(match["alias"])
    if alias == "t":
        return Compared(table, match["column"], operator, bool(match["any"]), True)
    for found in re.finditer(rf"{RELATION}(?:\s+(?:AS\s+)?{KEYWORDS}(?P<alias>{NAME}))?", text, re.I):
        own = found["alias"] or re.split(r"\s*\.\s*(?=[^\"]*(?:\"[^\"]*\"[^\"]*)*$)", found["relation"])[-1]
        if _unquoted(own) == alias:
            return Compared(found["relation"], match["column"], operator, bool(match["any"]), False)
    return None


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name.lower()


def of_filters(connection: db.Connection, params: Params, queries: Sequence[Query]) -> dict[str, list[str]]:
    """Values by filter name, those of the queries first; an empty list if none are known."""
    found: dict[str, list[str]] = {}
    for f in params.target.each_filter:
        own = [value for q in queries for name, value in q.filters if name == f.name]
        found[f.name] = list(dict.fromkeys([*own, *_held(connection, params, f)]))
    return found


def _held(connection: db.Connection, params: Params, f: Filter) -> list[str]:
    """Values that match rows, of many frequencies, taken from the compared column."""
    # The catalogue spells an array of a user-defined type without brackets.
    kind = f.type or conditions.types(connection, params)[f.name]
    column = f"t.{sql.Identifier(f.column).as_string()}" if f.column else ""
    where = Compared(spelled(params, "table"), column, "=", False, True) if f.column else _told(params, f)
    elements = where is not None and (where.any or where.operator in ARRAYS)
    if where is None or (elements and not kind.endswith("[]")) or (where.any and where.operator != "="):
        return []
    try:
        # A cast in the condition may fail on some rows.
        with connection.transaction():
            found = _looked_up(connection, params, where, kind, elements)
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        return []
    return list(_sets(found)) if elements else found


def _told(params: Params, f: Filter) -> Compared | None:
    found = compared(f, spelled(params, "table"))
    return found and replace(found, column=f"t.{found.column}")


def _looked_up(connection: db.Connection, params: Params, where: Compared, kind: str, elements: bool) -> list[str]:
    if where.ours:
        rows = row_counts.of(connection, params).n
    else:
        # The first rows of a table are often its oldest, or belong to one owner.
        rows = int(db.one(connection, SQL["rows_of"], params, relation=where.relation)["rows"])
    percent = 100.0 * SAMPLED_ROWS / max(rows, 1)
    sampled = sql.SQL("TABLESAMPLE SYSTEM ({}) REPEATABLE (1)").format(sql.Literal(percent))
    parts = {
        "relation": verbatim(where.relation),
        "column": verbatim(where.column),
        "type": verbatim(kind),
        "of_one": verbatim(kind.removesuffix("[]") if elements else kind),
        "sampled": sampled if rows > SAMPLED_ROWS else sql.SQL(""),
    }
    if where.operator in ORDERED:
        cuts = [cut if where.operator.startswith("<") else 1 - cut for cut in CUTS]
        row = connection.execute(SQL["cuts"].compose(parts), {"cuts": cuts, "rows": SAMPLED_ROWS}).fetchone()
        return [value for value in (row["values"] if row else None) or [] if value is not None]
    block = SQL["elements" if where.operator in ARRAYS else "frequencies"]
    values = {"most": OF_A_FREQUENCY, "rows": SAMPLED_ROWS}
    return [row["value"] for row in connection.execute(block.compose(parts), values).fetchall()]


def _sets(values: Sequence[str]) -> Iterator[str]:
    """Arrays of one and of several of the values, as PostgreSQL writes them."""
    chosen = random.Random(1)  # noqa: S311 - a sample, not a secret
    # The last two match most rows, like searches by users who may see nearly everything.
    for size in sorted({size for size in (*SETS, len(values) // 2, len(values)) if 0 < size <= len(values)}):
        sets = [[v] for v in values] if size == 1 else [chosen.sample(values, size) for _ in values[: 2 * VALUES]]
        for elements in sets:
            yield combined_filters.array_of(elements)


class Estimate:
    """The share of the rows that the planner expects to match the filters, as the search function asks for it."""

    def __init__(self, connection: db.Connection, params: Params) -> None:
        self.connection, self.params = connection, params
        self.rows = self._rows(conditions.SQL["rows_in_all"].compose(names(params)), {})
        places = {name: sql.Placeholder(name) for name in params.target.filters}
        self.conditions = conditions.each(connection, params, places)

    def of(self, allowed: Allowed) -> float:
        """0 to 1."""
        held = [names(self.params)["always"], *(self.conditions[name] for name, _ in allowed)]
        query = conditions.SQL["rows_let_through"].compose(
            names(self.params) | {"filters": sql.SQL(" AND ").join(held)}
        )
        return min(1.0, self._rows(query, dict(allowed)) / max(self.rows, 1.0))

    def _rows(self, query: sql.Composed, values: Mapping[str, str]) -> float:
        row = self.connection.execute(query, values, prepare=False).fetchone()
        expected = re.search(conditions.EXPECTED_ROWS, row["QUERY PLAN"]) if row else None
        return float(expected[1]) if expected else 0.0


def by_class(
    connection: db.Connection, params: Params, queries: Sequence[Query], chosen: random.Random
) -> dict[tuple[str, str], dict[Allowed, float]]:
    """What to ask of conditions: by the name of the filter, or TOGETHER, and the class of the share that is expected
    of them, at most VALUES each with that share; those of which no row was found are left out.
    """
    own = [f.name for f in params.target.each_filter if f.column is None]
    if not own:
        return {}
    known, estimate = of_filters(connection, params, queries), Estimate(connection, params)
    found: dict[tuple[str, str], dict[Allowed, float]] = {}
    until = time.monotonic() + LOOKED_FOR_S

    def add(name: str, asked: Allowed) -> None:
        share = estimate.of(asked)
        place = found.setdefault((name, share_classes.of(share)), {})
        wanted = asked not in place and _has_room(place, asked) and time.monotonic() < until
        if wanted and any_row(connection, params, estimate, asked):
            place[asked] = share

    for name in own:
        for value in chosen.sample(known[name], len(known[name])):
            add(name, ((name, value),))
    usable = [name for name in params.target.filters if known[name]]
    several = [q.filters for q in queries if len(q.filters) > 1]
    several += [_drawn(chosen, params, known, usable) for _ in range(DRAWN if len(usable) > 1 else 0)]
    for asked in several:
        if any(name in own for name, _ in asked):
            add(share_classes.TOGETHER, asked)
    return {place: _in_pairs(asked) for place, asked in found.items() if asked}


def _has_room(place: Mapping[Allowed, float], asked: Allowed) -> bool:
    if len(asked) == 1:
        return len(place) < VALUES
    return len(place) < VALUES_OF_SETS and sum(_set_of(other) == _set_of(asked) for other in place) < OF_A_SET


def _set_of(asked: Allowed) -> tuple[str, ...]:
    return tuple(name for name, _ in asked)


def _in_pairs(asked: Mapping[Allowed, float]) -> dict[Allowed, float]:
    """Every second one is held out: two of the same filters come one after the other, and first."""
    sets = [_set_of(each) for each in asked]
    return dict(sorted(asked.items(), key=lambda item: (sets.count(_set_of(item[0])) == 1, _set_of(item[0]))))


def _drawn(
    chosen: random.Random, params: Params, known: Mapping[str, Sequence[str]], usable: Sequence[str]
) -> Allowed:
    """Some of the filters, in the order of the parameters, each with a value."""
    some = set(chosen.sample(usable, chosen.randint(2, len(usable))))
    return tuple((name, chosen.choice(known[name])) for name in params.target.filters if name in some)


def any_row(connection: db.Connection, params: Params, estimate: Estimate, asked: Allowed) -> bool:
    """Is a row with a vector that matches these filters found within LONGEST_LOOK_S?"""
    held = [names(params)["always"], *(estimate.conditions[name] for name, _ in asked)]
    query = SQL["any_row"].compose(names(params) | {"filters": sql.SQL(" AND ").join(held)})
    started = time.monotonic()
    try:
        with connection.transaction():
            connection.execute(AT_MOST.compose({}), {"ms": str(round(1000 * LONGEST_LOOK_S))})
            row = connection.execute(query, dict(asked), prepare=False).fetchone()
    except psycopg.errors.QueryCanceled:
        if time.monotonic() - started < LONGEST_LOOK_S:
            raise
        return False
    return bool(row and row["there"])


def unknown(connection: db.Connection, params: Params, queries: Sequence[Query]) -> list[str]:
    """Conditions for which no value is known."""
    known = of_filters(connection, params, queries)
    return [f.name for f in params.target.each_filter if f.column is None and not known[f.name]]
