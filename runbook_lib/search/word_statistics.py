"""How common each word of the table is, by which hybrid weighs the words of a query: counted, renewed, forgotten."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import NamedTuple

from psycopg import sql

from runbook_lib.core import db, row_counts
from runbook_lib.core.display import number
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import identifier, literal, names, spelled
from runbook_lib.core.thresholds import percent, plain
from runbook_lib.params import Params
from runbook_lib.search import search_path, statements
from runbook_lib.sql import load

SQL = load("words")

# Rows that are counted; of a larger table, those of a sample of its pages.
SAMPLE_ROWS = 200_000
# A word of fewer rows is as good as unique, and may be somebody's name: it is not kept.
LEAST_ROWS = 2
COUNT = SQL["count"].name
# Counted again once the table has grown or shrunk by so much, or after so long.
DAY_S = 86_400.0
LARGEST_CHANGE, OLDEST_S = 0.2, 7 * DAY_S
# By then a refresh that is run now and then has counted them: the monitor fails.
OVERDUE = 2


class Counted(NamedTuple):
    """rows: of the table when its words were counted. vector_weight: None where the halves weigh alike."""

    rows: int | None
    counted_at: datetime | None
    vector_weight: float | None
    age_s: float | None


def create_tables(params: Params) -> sql.Composed:
    """The tables that the functions of the words half read; nothing where they are there."""
    return SQL["create_tables"].compose(names(params))


def tables_are_there(connection: db.Connection, params: Params) -> bool:
    """They come with the search function; one of an earlier release had none."""
    tables = {name: spelled(params, name) for name in ("words", "hybrid")}
    return bool(db.one(connection, SQL["tables_are_there"], params, **tables)["there"])


def counted(connection: db.Connection, params: Params) -> Counted | None:
    """What is known of this target's words; None where they were never counted."""
    if not tables_are_there(connection, params):
        return None
    found = db.rows(connection, SQL["counted"], params)
    return Counted(**found[0]) if found else None


def is_outdated(connection: db.Connection, params: Params) -> bool:
    """Has the table changed so much since its words were counted, or so long ago, that they should be again?"""
    if not params.search.has_tsvector:
        return False
    known = counted(connection, params)
    if known is None or known.rows is None or known.age_s is None or known.age_s > OLDEST_S:
        return True
    return abs(row_counts.of(connection, params).n - known.rows) > LARGEST_CHANGE * max(known.rows, 1)


def are_current(connection: db.Connection, params: Params) -> Gate:
    """Gate: the words were counted not long ago, over about as many rows as there are."""
    known = counted(connection, params)
    there = row_counts.of(connection, params).n
    found = "the words were never counted"
    fits = False
    if known and known.rows is not None and known.age_s is not None:
        change = abs(there - known.rows) / max(known.rows, 1)
        fits = known.age_s <= OVERDUE * OLDEST_S and change <= OVERDUE * LARGEST_CHANGE
        ago = f"{known.age_s / DAY_S:.1f} days ago"
        found = f"counted {ago}, over {number(known.rows)} rows of {number(there)} today"
    return gate(
        "watch.words_are_counted",
        fits,
        spelled(params, "words"),
        found=found,
        needed=f"counted in the last {plain(OVERDUE * OLDEST_S / DAY_S)} days, since when the table has grown or"
        f" shrunk by {percent(OVERDUE * LARGEST_CHANGE)} at most",
        danger="hybrid ranks worse by old counts, and may look up words that are common by now",
        do="run operate/refresh with execute: true, which counts them again, and schedule it",
        figures={"rows": known.rows, "age_s": known.age_s, "rows_now": there} if known else {},
    )


def due(connection: db.Connection, params: Params) -> list[db.Statement]:
    """The count of the words, where they were never counted or too long ago."""
    return [count_statement(connection, params)] if is_outdated(connection, params) else []


def count_statement(connection: db.Connection, params: Params) -> db.Statement:
    """Counts the words anew; a search meanwhile weighs by the former count."""
    rows = row_counts.of(connection, params).n
    share = min(1.0, SAMPLE_ROWS / rows) if rows else 1.0
    sample = f" TABLESAMPLE SYSTEM ({100 * share:.6f})" if share < 1 else ""
    names_of_it = {**statements.fulltext_names(connection, params), "sample": sql.SQL(sample)}
    documents = SQL["documents"].compose({**names(params), **names_of_it}).as_string(connection).replace("%%", "%")
    path = ", ".join(map(_quoted, search_path.expression_path(connection, params)))
    own = {
        "documents": literal(documents),
        "path": literal(path),
        "rows": sql.Literal(rows),
        "times": sql.Literal(1 / share),
        "least_rows": sql.Literal(LEAST_ROWS),
    }
    of = f"{number(SAMPLE_ROWS)} of {number(rows)}" if share < 1 else number(rows)
    announced = f"{COUNT}: about {of} rows are read; searches continue meanwhile"
    return replace(db.statement(SQL["count"], params, own), announced=announced)


def learn_statement(params: Params, vector_weight: float | None) -> db.Statement:
    """Keeps the weight of the vectors' half; None for equal weights."""
    return db.statement(SQL["learn_weight"], params, vector_weight=vector_weight)


def forget_plan(connection: db.Connection, params: Params) -> list[db.Statement]:
    """Takes away what is known of this target's words, where something is."""
    return [db.statement(SQL["forget"], params)] if counted(connection, params) else []


def _quoted(name: str) -> str:
    return identifier(name).as_string().replace("%%", "%")
