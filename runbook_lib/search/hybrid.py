"""The hybrid route's statement: its halves, each scored, and the sum of both.

Words are weighed by how rare they are and looked up rarest first, so that the rows read stay few however large the
table is. Both scores are worked out for every row that either half found, and brought to one scale before they are
added.
"""

from __future__ import annotations

from collections.abc import Mapping

from psycopg import sql

from runbook_lib.core.names import verbatim
from runbook_lib.params import Params, placeholders
from runbook_lib.search.ways import Scan
from runbook_lib.sql import load

SQL = load("routes")

EQUAL_WEIGHT = 0.5
# Rows that the words half hands on, for each that the vectors' half does: their last score takes both.
WORDS_FOR_EACH_VECTOR = 2
# A word and a row that holds it are looked up together; so many pairs for each of search.hybrid.word_rows.
MOST_PAIRS = 8
# What a query has of codes, versions and numbers: a run of such characters with a digit or an underscore among them.
CODE = r"[[:alnum:]_.:/#@+-]*[0-9_][[:alnum:]_.:/#@+-]*"
# A row with the whole code goes before rows that hold its parts often, in a title too.
CODE_FACTOR = 20

Parts = Mapping[str, sql.Composable]


def limits(params: Params) -> dict[str, sql.Composable]:
    """How many rows the words half looks at, and how many it hands on."""
    s = params.search
    return {
        "word_rows": sql.Literal(s.hybrid.word_rows),
        "most_looked_up": sql.Literal(MOST_PAIRS * s.hybrid.word_rows),
        "word_candidates": sql.Literal(WORDS_FOR_EACH_VECTOR * s.hybrid_candidates),
    }


def statement(params: Params, parts: Parts, scan: Scan, near_enough: sql.Composable, indent: int) -> sql.Composed:
    """The k best rows. near_enough: a condition on the ``distance`` of a nearest row."""
    learned = params.search.hybrid.weights == "learned"
    equal = sql.SQL("{}::double precision").format(sql.Literal(EQUAL_WEIGHT))
    weight = sql.SQL("(SELECT {}({}))").format(parts["vector_weight"], equal) if learned else equal
    scored = _scored(params, parts, scan, near_enough, indent + 4)
    return SQL["hybrid"].compose({**parts, "vector_weight": weight, "scored": scored}, indent)


def scored_statement(params: Params, parts: Parts) -> sql.Composed:
    """Every row that either half finds, with both scores: what weights are learned from."""
    return _scored(params, parts, "index", sql.SQL("true"), 0)


def words_statement(params: Params, parts: Parts) -> sql.Composed:
    """The words half alone."""
    own = {**parts, "row_distance": sql.SQL("NULL::float8")}
    halves = {"words_half": _words_half(params, own, "index", 0), "weighed": _weighed(params, own, 4)}
    return SQL["fulltext"].compose({**own, **halves})


def _scored(params: Params, parts: Parts, scan: Scan, near_enough: sql.Composable, indent: int) -> sql.Composed:
    distance = sql.SQL("{} {} {}").format(parts["row_embedding"], parts["distance"], parts["query_vector"])
    own = {**parts, "row_distance": distance, "near_enough": near_enough}
    halves = {
        "nearest": SQL["nearest"].compose(own, indent),
        "words_half": _words_half(params, own, scan, indent),
        "weighed": _weighed(params, own, indent + 4),
    }
    return SQL["scored"].compose({**own, **halves}, indent)


def _words_half(params: Params, parts: Parts, scan: Scan, indent: int) -> sql.Composed:
    own = {**parts, **limits(params)}
    if params.search.words_query is not None:
        return SQL["by_words_query"].compose({**own, "words_query": words_query(params, parts)}, indent)
    # Where few rows pass the filters, hardly one may be among those that hold the rarest words.
    return SQL["by_any_word" if scan == "exact" else "by_rare_words"].compose(own, indent)


def words_query(params: Params, parts: Parts) -> sql.Composed:
    """The user's own statement, its :query, :k and :<filter> bound."""
    own = {
        "query": parts["query_text"],
        "k": sql.SQL("({})").format(limits(params)["word_candidates"]),
        **{name: parts[f"filter {name}"] for name in params.target.filters},
    }
    pieces = placeholders.split(params.search.words_query or "", list(own))
    return sql.Composed([own[piece] if is_name else verbatim(piece) for is_name, piece in pieces])


def _weighed(params: Params, parts: Parts, indent: int) -> sql.Composed:
    by = "weighed_by_words" if params.search.words_query is None else "weighed_by_words_query"
    return SQL[by].compose(parts, indent)
