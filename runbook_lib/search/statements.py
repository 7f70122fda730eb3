"""The statements of the searches: the legacy query, the routes of the search function, and calls of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.names import as_indexed, has_chunks, identifier, names, verbatim
from runbook_lib.params import Params, placeholders
from runbook_lib.search import conditions, hybrid
from runbook_lib.search.ways import Scan
from runbook_lib.sql import load

SQL = load("search")
ROUTES, CHUNKS = load("routes"), load("chunks")

# Chunks that a search reads for each row that it looks for; where they are of fewer rows, as many again.
CHUNKS_FOR_A_ROW = 4

Route = Literal["legacy", "vector", "hybrid"]


def _placeholders(params: Params, in_function: bool) -> dict[str, sql.Composable]:
    """How the query text, its vector, k and the filters are written: $n inside the function, %(name)s outside."""
    asked = ["query", "embedding", "k", *params.target.filters]
    own: dict[str, sql.Composable] = {
        name: sql.SQL(f"${i}") if in_function else sql.Placeholder(name) for i, name in enumerate(asked, 1)
    }
    text = own["query"] if in_function else sql.SQL("{}::text").format(own["query"])
    vector = sql.SQL("{}::{}").format(own["embedding"], names(params)["vector_type"])
    return {**own, "query": text, "embedding": vector}


def min_similarity(params: Params) -> sql.SQL:
    """The smallest similarity of a call, inside a function: its last argument."""
    return sql.SQL(f"${4 + len(params.target.filters)}")


def similarity(params: Params, distance: sql.Composable) -> sql.Composed:
    """Of a row to the query, from the distance of their vectors: the larger, the more alike, whatever the distance.

    The cosine; the inner product, of which pgvector has the negative; for l2 1 at the same place, towards 0 far away.
    """
    forms = {"cosine": "1 - {}", "inner_product": "-{}", "l2": "1 / (1 + {})"}
    return sql.SQL(forms[params.vector.distance]).format(distance)


def similarity_of_score(params: Params, score: sql.Composable) -> sql.Composed:
    """The same from the score of the vector route, which is the distance negated."""
    forms = {"cosine": "1 + {}", "inner_product": "{}", "l2": "1 / (1 - {})"}
    return sql.SQL(forms[params.vector.distance]).format(score)


def legacy_statement(connection: db.Connection, params: Params) -> sql.Composed:
    """The search of today. ``:query``, ``:k`` and ``:<filter>`` become bound values; everything else stays.

    A filter has its type, as in the function: an application's driver often gives it, and without it PostgreSQL
    refuses ``:owner IS NULL OR …``.
    """
    types = conditions.types(connection, params) if params.target.filters else {}
    typed = {
        name: sql.SQL("({}::{})").format(sql.Placeholder(name), verbatim(types[name]))
        for name in params.target.filters
        if name in types
    }
    return _legacy(params, _placeholders(params, in_function=False) | {"query": sql.Placeholder("query")} | typed)


def legacy_in_function(params: Params) -> sql.Composed:
    """The same in the function, whose arguments are typed."""
    return _legacy(params, _placeholders(params, in_function=True) | {"query": sql.SQL("$1")})


def _legacy(params: Params, places: Mapping[str, sql.Composable]) -> sql.Composed:
    pieces = placeholders.split(params.legacy.query, ["query", "k", *params.target.filters])
    return sql.Composed([places[piece] if is_name else verbatim(piece) for is_name, piece in pieces])


def route_statement(
    connection: db.Connection,
    params: Params,
    route: Route,
    *,
    in_function: bool = False,
    scan: Scan = "index",
    indent: int = 0,
    given: Collection[str] | None = None,
    filters: sql.Composable | None = None,
) -> sql.Composed:
    """The query of a route: the key; for vector and hybrid a score, the best first; for hybrid the similarity too.

    scan: ``relaxed`` is the same as ``index`` for hybrid, which sorts in any case. indent: blanks before its lines.
    given: as :func:`conditions.where` has it. filters: in their place.
    """
    if route == "legacy":
        return legacy_in_function(params) if in_function else legacy_statement(connection, params)
    places = _placeholders(params, in_function)
    sorted_again = scan == "relaxed" or (scan == "index" and params.index.storage != "vector")
    block = "hybrid" if route == "hybrid" else "relaxed" if sorted_again else "exact_or_vector"
    passed = conditions.where(connection, params, places, given) if filters is None else filters
    parts = _parts(params, places, route, scan, passed)
    if route == "hybrid":
        least, alike = min_similarity(params), similarity(params, sql.SQL("distance"))
        near = sql.SQL("({m} IS NULL OR {s} >= {m})").format(m=least, s=alike)
        words = {**parts, **_of_words(connection, params, places), "similarity": alike}
        return hybrid.statement(params, words, scan, near if in_function else sql.SQL("true"), indent)
    return ROUTES[block].compose(parts | {"nearest": ROUTES["nearest"].compose(parts, indent)}, indent)


def scored_statement(connection: db.Connection, params: Params, given: Collection[str] = ()) -> sql.Composed:
    """Every row that either half of hybrid finds, with the scores of both: ``near`` and ``wordy``.

    given: the filters that have a value.
    """
    return hybrid.scored_statement(params, _of_hybrid(connection, params, given))


def fulltext_statement(connection: db.Connection, params: Params, given: Collection[str] = ()) -> sql.Composed:
    """The words half of hybrid alone. given: the filters that have a value."""
    return hybrid.words_statement(params, _of_hybrid(connection, params, given))


def _of_hybrid(connection: db.Connection, params: Params, given: Collection[str]) -> dict[str, sql.Composable]:
    places = _placeholders(params, in_function=False)
    parts = _parts(params, places, "hybrid", "index", conditions.where(connection, params, places, given))
    return parts | _of_words(connection, params, places)


def _parts(
    params: Params, places: Mapping[str, sql.Composable], route: Route, scan: Scan, filters: sql.Composable
) -> dict[str, sql.Composable]:
    parts = {
        **names(params),
        "nearest_first": _nearest_first(params, places["embedding"], scan),
        "query_text": places["query"],
        "query_vector": places["embedding"],
        "k": places["k"],
        "fetched": _fetched(params, places["k"], route, scan),
        "filters": filters,
    }
    return parts | _through_chunks(params, parts, scan)


def nearest_chunk_of_each_row(params: Params, vector: sql.Composable) -> dict[str, sql.Composable]:
    """Where the vectors are of chunks: in place of each row's first chunk, the one that is nearest to the query."""
    if not has_chunks(params):
        return {}
    n = names(params)
    nearest = CHUNKS["nearest_chunk"].compose(n | {"query_vector": vector}, 4)
    return {
        name: sql.SQL("{} t {} {}").format(n["table"], sql.SQL(join), nearest)
        for name, join in (("from_vectors", "JOIN"), ("with_vectors", "LEFT JOIN"))
    }


def _through_chunks(params: Params, parts: Mapping[str, sql.Composable], scan: Scan) -> dict[str, sql.Composable]:
    """The same for a search: through the index the rows of the nearest chunks alone, sorted by their distances."""
    if not has_chunks(params):
        return {}
    vector = parts["query_vector"]
    each_row = nearest_chunk_of_each_row(params, vector)
    if scan == "exact":
        return each_row
    own = {
        **parts,
        "chunks": sql.SQL("({}) * {}").format(parts["fetched"], sql.Literal(CHUNKS_FOR_A_ROW)),
        "nearest_chunk": CHUNKS["nearest_chunk"].compose(parts, 4),
    }
    return each_row | {
        "from_vectors": CHUNKS["rows_through_the_index"].compose(own, 4),
        "nearest_first": _nearest_first(params, vector, "exact"),
    }


def _of_words(
    connection: db.Connection, params: Params, places: Mapping[str, sql.Composable]
) -> dict[str, sql.Composable]:
    """What the words half needs: the tsvector, or the filters by name for a statement of the user's own."""
    types = conditions.types(connection, params)
    # Typed here as in the function, where a statement may only ask whether one is NULL.
    given: dict[str, sql.Composable] = {
        f"filter {name}": sql.SQL("({}::{})").format(places[name], verbatim(types[name]))
        for name in params.target.filters
    }
    return given | (fulltext_names(connection, params) if params.search.has_tsvector else {})


def fulltext_names(connection: db.Connection, params: Params) -> dict[str, sql.Composable]:
    """``{fulltext}``, the tsvector of the row ``t``, and ``{fulltext_config}``, by which a query becomes words.

    An expression is for a ``LATERAL (SELECT {fulltext})`` that sees ``t`` alone: there its names are columns of the
    row, and the planner finds the index on it.
    """
    s = params.search
    config = text_search_config(connection, params)
    # A comment may end the expression.
    document = (
        sql.SQL("({}\n)").format(verbatim(s.fulltext_expression))
        if s.fulltext_expression
        else identifier("t", s.fulltext_column or "")
    )
    spelled_config = config["spelled"] if config else s.fulltext_config
    return {
        "fulltext": document,
        "fulltext_config": verbatim(f"{sql.Literal(spelled_config).as_string()}::pg_catalog.regconfig"),
    }


def any_word_statement(connection: db.Connection, params: Params) -> sql.Composed:
    """Any word of a query by the index on the tsvector: what preflight plans."""
    return ROUTES["any_word"].compose(names(params) | fulltext_names(connection, params))


def words_query_condition(connection: db.Connection, params: Params) -> sql.Composed:
    """``search.words_query`` as a condition on a row ``t``, that it finds this row, without filters."""
    nothing = dict.fromkeys(params.target.filters, sql.SQL("NULL"))
    parts = {**names(params), "query_text": sql.SQL("'word'::text"), **_of_words(connection, params, nothing)}
    return ROUTES["found_by_words_query"].compose(parts | {"words_query": hybrid.words_query(params, parts)})


def text_search_config(connection: db.Connection, params: Params, name: str = "") -> db.Row | None:
    """The configuration of that name, or of the parameters: its oid, and its name spelt whole; None if none is."""
    values = {"config": name or params.search.fulltext_config, "schema": params.target.schema_}
    found = db.rows(connection, SQL["text_search_config"], params, **values)
    return found[0] if found else None


def _nearest_first(params: Params, vector: sql.Composable, scan: Scan) -> sql.Composable:
    """The sort key: what the index holds of both vectors, by the operator that it serves."""
    n = names(params)
    if scan == "exact":
        # An expression around the distance is what no vector index can answer.
        return sql.SQL("({} {} {}) + 0").format(n["row_embedding"], n["distance"], vector)
    return sql.SQL("{} {} {}").format(n["row_indexed"], n["index_distance"], as_indexed(params, vector))


def _fetched(params: Params, k: sql.Composable, route: Route, scan: Scan) -> sql.Composable:
    """Rows that are fetched by the sort key, before the full vectors sort them: storage bit needs more of them."""
    candidates = sql.Literal(params.search.hybrid_candidates)
    if params.index.storage != "bit" or scan == "exact":
        return candidates if route == "hybrid" else k
    rows = sql.SQL("{} * {}").format(k, sql.Literal(params.index.rerank))
    return sql.SQL("greatest({}, {})").format(candidates, rows) if route == "hybrid" else rows


def call_statement(params: Params) -> sql.Composed:
    """A call of the function, as the application makes it."""
    return SQL["call"].compose(names(params))


def matching_statement(connection: db.Connection, params: Params) -> sql.Composed:
    """Counts the rows, up to k, that the filters let through; bound as in :func:`filtered_call_statement`."""
    filters = conditions.where(connection, params, _placeholders(params, in_function=False))
    return SQL["count_matching"].compose(names(params) | {"filters": filters})


def filtered_call_statement(
    connection: db.Connection, params: Params, *, as_application: bool = False
) -> sql.Composed:
    """The same with every filter bound by its column's name; NULL lets every row through.

    as_application: the smallest similarity leaves rows out; otherwise none is.
    """
    types = conditions.types(connection, params)
    given: list[sql.Composable] = [
        sql.SQL(", {} => {}::{}").format(identifier(f"filter_{c}"), sql.Placeholder(c), verbatim(types[c]))
        for c in params.target.filters
    ]
    if params.search.smallest_similarity is not None and not as_application:
        # What is measured with this call is which rows are found, before any is left out.
        given.append(sql.SQL(", min_similarity => NULL"))
    return SQL["call_filtered"].compose(names(params) | {"filters": sql.SQL("").join(given)})


def force_route(connection: db.Connection, params: Params, route: str) -> None:
    """Names the route of the calls of this transaction, whatever the table says; no row of it is locked."""
    connection.execute(SQL["force_route"].compose(names(params)), {"route": route})
