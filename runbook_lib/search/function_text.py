"""The functions that are installed for a target, as text: the one that the application calls, and those that answer
for it, one for each route.

``search_<target>`` checks its arguments, finds the route, and asks one of ``<target>_by_<route>`` in the ledger's
schema, which holds that route's query and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from psycopg import sql

from runbook_lib.core import db, session
from runbook_lib.core.names import function_of, identifier, names, verbatim, words_functions
from runbook_lib.params import Params
from runbook_lib.search import combined_filters, conditions, hybrid, share_classes, ways
from runbook_lib.search.statements import (
    Route,
    fulltext_names,
    legacy_statement,
    min_similarity,
    route_statement,
    similarity_of_score,
)
from runbook_lib.sql import DOLLAR_TAG, load

SQL, WORDS = load("search_function"), load("words")

# Rows that a call gets which does not say how many, or says NULL.
DEFAULT_K = 10
CLOSED = ("pg_catalog", "pg_temp")
# Where a query that is put together takes the conditions of the filters that are given.
GIVEN = "/* given */"


@dataclass(frozen=True)
class Argument:
    """Of a function. type: as SQL spells it. default: as SQL, empty for none."""

    name: str
    type: str
    default: str = ""

    def declared(self) -> sql.Composable:
        default = f" DEFAULT {self.default}" if self.default else ""
        return sql.SQL("{} {}").format(identifier(self.name), verbatim(self.type + default))


@dataclass(frozen=True)
class Function:
    """A function to be installed. made: the statement that makes it. results: the columns of its rows."""

    schema: str
    name: str
    arguments: Sequence[Argument]
    results: Sequence[Argument]
    made: sql.Composed

    @property
    def signature(self) -> sql.Composable:
        """Name and types, as GRANT and DROP want them."""
        types = sql.SQL(", ").join(verbatim(a.type) for a in self.arguments)
        return sql.SQL("{}({})").format(identifier(self.schema, self.name), types)

    def wanted(self, connection: db.Connection) -> dict[str, object]:
        """What the catalogue will say of it."""
        text = self.made.as_string(connection).replace("%%", "%")
        # What ends the statement encloses the body; a name may hold another.
        body = text.split(DOLLAR_TAG.findall(text)[-1])[1]
        columns = [*self.arguments, *self.results]
        return {
            "schema": self.schema,
            "name": self.name,
            "takes": [a.type for a in self.arguments],
            "names": [a.name for a in columns],
            "types": [a.type for a in columns],
            "defaults": [a.default for a in self.arguments if a.default],
            "source": hashlib.md5(body.encode(), usedforsecurity=False).hexdigest(),
        }


def functions(
    connection: db.Connection, params: Params, settings: Mapping[str, str], retired: bool
) -> list[Function]:
    """All of a target, the one that the application calls first.

    settings: of pgvector, which it carries. retired: its legacy branch is gone.
    """
    answering = [*_by_route(connection, params), *_share(connection, params)]
    if retired:
        answering = [f for f in answering if f.name != function_of(params, "legacy")]
    search = _search(connection, params, settings, retired)
    words = _of_words(connection, params)
    called = overloads(connection, params, params.function_name)
    return [search, *called, *answering, *words, _check_vector(params)]


def filter_arguments(connection: db.Connection, params: Params) -> list[Argument]:
    """The arguments for the filters: NULL, the default, lets every row through."""
    types = conditions.types(connection, params)
    return [Argument(f"filter_{column}", types[column], "NULL") for column in params.target.filters]


def _arguments(connection: db.Connection, params: Params) -> list[Argument]:
    least = params.search.smallest_similarity
    # As PostgreSQL spells it, so that the one in the catalogue can be compared.
    spelt = "NULL" if least is None else f"'{repr(least).removesuffix('.0')}'::double precision"
    return [
        Argument("query_text", "text"),
        Argument("query_embedding", "real[]", "NULL"),
        Argument("k", "integer", str(DEFAULT_K)),
        *filter_arguments(connection, params),
        Argument("min_similarity", "double precision", spelt),
    ]


def _results(connection: db.Connection, params: Params) -> list[Argument]:
    """The columns of an answer: those of earlier releases first, for callers that read them by their place."""
    types = conditions.of_columns(connection, params, [params.target.key, *params.search.returns])
    return [
        Argument(params.target.key, types[params.target.key]),
        Argument("score", "double precision"),
        Argument("answered_by", "text"),
        Argument("similarity", "double precision"),
        Argument("rank", "integer"),
        *(Argument(column, types[column]) for column in params.search.returns),
    ]


def _search(connection: db.Connection, params: Params, settings: Mapping[str, str], retired: bool) -> Function:
    p, arguments, results = params, _arguments(connection, params), _results(connection, params)
    filters = bool(p.target.filters)
    made = SQL["search"].compose(
        names(p)
        | {
            "arguments": sql.SQL(", ").join(a.declared() for a in arguments),
            "results": sql.SQL(", ").join(a.declared() for a in results),
            "default_k": sql.Literal(DEFAULT_K),
            "kept_settings": _set_clauses(settings),
            "dimension": sql.Literal(p.vector.dimension),
            # Under l2 a vector of zeros is a place like any other.
            "refuses_zero": sql.Literal(p.vector.distance != "l2"),
            "declared": _more(SQL["choose_way_variables"].compose({}, 4)) if filters else sql.SQL(""),
            "choose_way": _more(_choose_way(p)) if filters else sql.SQL(""),
            "answers": _answers(p, arguments, retired),
        }
    )
    return Function(p.target.schema_, p.function_name, arguments, results, made)


# By the type of the query's vector: that of its text, how the vector is passed on, and what for. PostgreSQL takes a
# value without a type, such as a literal, for text. An array of integers fits real[] as well as double precision[]:
# there it prefers text to character varying, and so takes the function itself.
OVERLOADS = {
    "double precision[]": (
        "character varying",
        "query_embedding::pg_catalog.float4[]",
        "For a list of numbers as most drivers send it.",
    ),
    "text": (
        "text",
        "pg_catalog.translate(query_embedding, '[]', '{}')::pg_catalog.float4[]",
        "For '[1, 2, 3]', '{1, 2, 3}', and NULL or a literal without a type.",
    ),
}


def overloads(connection: db.Connection, params: Params, name: str) -> list[Function]:
    """Functions of this name, which pass other types of a query's vector on to the one that takes real[]."""
    arguments, results = _arguments(connection, params), _results(connection, params)
    text, vector, *others = arguments
    made = []
    for kind, (text_type, passed, what) in OVERLOADS.items():
        own = [replace(text, type=text_type), replace(vector, type=kind, default=""), *others]
        given = [sql.SQL("query_text::pg_catalog.text"), sql.SQL(passed), *(identifier(a.name) for a in others)]
        parts = {
            "function": identifier(params.target.schema_, name),
            "arguments": sql.SQL(", ").join(a.declared() for a in own),
            "results": sql.SQL(", ").join(a.declared() for a in results),
            "default_k": sql.Literal(DEFAULT_K),
            "passed": sql.SQL(", ").join(given),
            "what": sql.SQL(what.replace("{", "{{").replace("}", "}}")),
        }
        made.append(Function(params.target.schema_, name, own, results, SQL["overload"].compose(parts)))
    return made


def _more(statement: sql.Composable) -> sql.Composable:
    """A statement, or declarations, below others in the body of the function."""
    return sql.SQL("\n    {};").format(statement)


def _answers(params: Params, arguments: Sequence[Argument], retired: bool) -> sql.Composable:
    """The part of the function that asks the function of the route and the way that were chosen."""
    branches = [
        ("chosen = 'vector' AND way = 'exact'", "vector", "vector_exact"),
        ("chosen = 'vector' AND way = 'relaxed'", "vector", "vector_relaxed"),
        ("chosen = 'vector'", "vector", "vector"),
        ("chosen = 'hybrid' AND way = 'exact'", "hybrid", "hybrid_exact"),
        ("chosen = 'hybrid'", "hybrid", "hybrid"),
    ]
    made = set(_ways(params))
    # Without words of its own to search, hybrid is the search by the vectors.
    given = [
        (
            c if params.search.has_fulltext else c.replace("chosen = 'vector'", "chosen IN ('vector', 'hybrid')"),
            r,
            way,
        )
        for c, r, way in branches
        if way in made
    ]
    returned = params.search.returns
    of_the_row = SQL["of_the_row"].compose(names(params))
    own = {
        "passed": sql.SQL(", ").join(identifier(a.name) for a in arguments),
        "columns": sql.SQL("").join(sql.SQL(", {}").format(identifier("t", c)) for c in returned),
        "of_the_row": sql.SQL("\n        {}").format(of_the_row) if returned else sql.SQL(""),
    }

    def answer(route: str, way: str) -> sql.Composable:
        asked = {"answered_by": sql.Literal(route), "by_route": names(params)[f"by_{way}"]}
        return SQL["answer"].compose(own | asked, 8)

    parts = [
        sql.SQL("{} {} THEN\n        {};\n    ").format(
            sql.SQL("ELSIF" if i else "IF"), sql.SQL(condition), answer(route, way)
        )
        for i, (condition, route, way) in enumerate(given)
    ]
    message = verbatim(sql.Literal(f"the legacy search behind {params.function_name} was retired").as_string())
    last = SQL["refuse_legacy"].compose({"retired_message": message}, 8) if retired else answer("legacy", "legacy")
    return sql.SQL("{}ELSE\n        {};\n    END IF;").format(sql.SQL("").join(parts), last)


def _choose_way(params: Params) -> sql.Composable:
    """The part of the function that looks up how to search by the filters that are given."""
    t, method = params.target, params.index.method
    given = {name: identifier(f"filter_{name}") for name in t.filters}
    columns = [given[name] for name in t.filter_columns]
    every, own = list(given.values()), {f.name: given[f.name] for f in t.each_filter if f.column is None}
    parts = {
        "filter_arguments": sql.SQL(", ").join(every),
        "conditions": sql.SQL(", ").join(own.values()),
        "asked_filter": combined_filters.given_name(t.filter_columns, columns) if columns else sql.SQL("NULL"),
        "asked_value": combined_filters.given_value(columns) if columns else sql.SQL("NULL"),
        "asked_condition": combined_filters.given_name(list(own), list(own.values())),
        "together": sql.Literal(share_classes.TOGETHER),
    }
    several = "how.scan = 'unmeasured' AND num_nonnulls({filter_arguments}) > 1"
    unknown = f"{several} OR num_nonnulls({{conditions}}) > 0" if own else several
    return SQL["choose_way"].compose(
        names(params)
        | {
            "filter_arguments": parts["filter_arguments"],
            "asked": SQL["asked_of_conditions" if own else "asked"].compose(names(params) | parts, 4),
            "exact_unmeasured": sql.SQL(unknown).format(**parts),
            "setting": sql.Literal(ways.SETTING[method]),
            "iterative_setting": sql.Literal(ways.ITERATIVE[method][0]),
            "most_scanned_setting": sql.Literal(ways.MOST_SCANNED[method]),
        },
        4,
    )


def _set_clauses(settings: Mapping[str, str]) -> sql.Composable:
    clauses = [sql.SQL("SET {} = {}").format(sql.SQL(name), sql.Literal(v)) for name, v in settings.items()]
    return sql.SQL(" ").join(clauses)


# What each is, for who reads it; how it scans.
WHAT: Mapping[str, tuple[str, Route, ways.Scan]] = {
    "legacy": ("The search from before the migration, as params.legacy.query has it.", "legacy", "index"),
    "vector": ("The nearest rows by their vectors, through the index.", "vector", "index"),
    "vector_relaxed": (
        "The nearest rows through the index, which may return them out of order; sorted afterwards.",
        "vector",
        "relaxed",
    ),
    "vector_exact": ("The nearest of all rows that match the filters, without the vector index.", "vector", "exact"),
    "hybrid": ("The nearest rows through the index and those that match best by words, combined.", "hybrid", "index"),
    "hybrid_exact": ("Like hybrid, but with the nearest of all rows, without the vector index.", "hybrid", "exact"),
}


def _ways(params: Params) -> list[str]:
    """Those of WAYS_TO_ANSWER that this target needs, whatever its index holds."""
    return [
        way
        for way in WHAT
        if (params.target.filters or way in ("legacy", "vector", "hybrid"))
        and (params.search.has_fulltext or not way.startswith("hybrid"))
    ]


def _by_route(connection: db.Connection, params: Params) -> list[Function]:
    p = params
    arguments = [Argument(a.name, a.type) for a in _arguments(connection, p)]
    key_type = conditions.types(connection, p)[p.target.key]
    results = [
        Argument("key", key_type),
        Argument("similarity", "double precision"),
        Argument("score", "double precision"),
    ]
    # A name may run over two lines, and a comment may not.
    numbered = ", ".join(f"${i} {' '.join(a.name.split())}" for i, a in enumerate(arguments, 1))
    made = []
    for way in _ways(p):
        what, route, scan = WHAT[way]
        subqueries = route != "legacy" and any(conditions.has_subquery(f) for f in p.target.each_filter)
        own = {
            "by_route": names(p)[f"by_{way}"],
            "arguments": sql.SQL(", ").join(a.declared() for a in arguments),
            "key_type": verbatim(key_type),
            "default_k": sql.Literal(DEFAULT_K),
            "search_path": sql.SQL(", ").join(map(identifier, _path(connection, p, route))),
            "what": sql.SQL(what),
            "arguments_by_number": verbatim(numbered),
            "query": _query(connection, p, route, scan, sql.SQL(GIVEN) if subqueries else None),
        }
        if subqueries:
            own["query"] = _string(own["query"])
            own |= {"given": _given(connection, p, first=4), "always": _string(names(p)["always"])}
            own["passed"] = sql.SQL(", ").join(identifier(a.name) for a in arguments)
        block = SQL["by_route_of_subqueries" if subqueries else "by_route"]
        made.append(Function(p.ledger.schema_, function_of(p, way), arguments, results, block.compose(own)))
    return made


def _string(text: sql.Composable) -> sql.Composable:
    """A piece of SQL as a string, for EXECUTE."""
    return verbatim(sql.Literal(text.as_string().replace("%%", "%")).as_string())


def _given(connection: db.Connection, params: Params, first: int) -> sql.Composable:
    """The part of a function that puts together the conditions of those filters that are given: a subquery is planned
    as a join only where nothing else would let its rows through. first: the number of the first filter's argument.
    """
    places = {name: sql.SQL(f"${first + i}") for i, name in enumerate(params.target.filters)}
    parts = [
        SQL["given"].compose({"argument": identifier(f"filter_{name}"), "condition": _string(condition)}, 4)
        for name, condition in conditions.each(connection, params, places).items()
    ]
    return sql.SQL(";\n    ").join(parts)


def _query(
    connection: db.Connection, params: Params, route: Route, scan: ways.Scan, filters: sql.Composable | None
) -> sql.Composable:
    """A route's query with the columns that its function returns. filters: in place of theirs."""
    if route == "legacy":
        own = {"key": names(params)["key"], "query": legacy_statement(params, in_function=True)}
        return SQL["legacy"].compose(own, 4)
    if route == "hybrid":
        return route_statement(connection, params, route, in_function=True, scan=scan, indent=4, filters=filters)
    own = {
        "similarity": similarity_of_score(params, sql.SQL("best.score")),
        "min_similarity": min_similarity(params),
        "query": route_statement(connection, params, route, in_function=True, scan=scan, indent=8, filters=filters),
    }
    return SQL["vector"].compose(own, 4)


def _path(connection: db.Connection, params: Params, route: Route) -> list[str]:
    """The search path of a route's function. Legacy's names resolve as they do for the application, temporary ones
    last; an expression's as in :func:`expression_path`.
    """
    if route == "legacy":
        return list(dict.fromkeys([params.target.schema_, *session.inherited(connection), "pg_temp"]))
    if conditions.are_expressions(params) or route == "hybrid":
        return expression_path(connection, params)
    return list(CLOSED)


def expression_path(connection: db.Connection, params: Params) -> list[str]:
    """The path of what the parameters write as SQL, conditions and the words half: pg_catalog first, pg_temp last.
    Between them the table's schema and those that the session sees; none of them where others may create.
    """
    s = params.search
    if not (s.fulltext_expression or s.words_query or conditions.are_expressions(params)):
        return list(CLOSED)
    row = connection.execute("SELECT current_schemas(false) AS seen").fetchone()
    wanted = [params.target.schema_, *(row["seen"] if row else [])]
    closed_off = [row["schema"] for row in session.open_schemas(connection)]
    between = [schema for schema in wanted if schema not in (*closed_off, *CLOSED)]
    return ["pg_catalog", *dict.fromkeys(between), "pg_temp"]


def _share(connection: db.Connection, params: Params) -> list[Function]:
    """What tells how few rows the filters of a call let through; only conditions need it."""
    p = params
    if not any(f.column is None for f in p.target.each_filter):
        return []
    arguments = [Argument(a.name, a.type) for a in filter_arguments(connection, p)]
    explained = conditions.SQL["rows_let_through"].compose(names(p) | {"filters": sql.SQL(GIVEN)})
    own = names(p) | {
        "arguments": sql.SQL(", ").join(a.declared() for a in arguments),
        "search_path": sql.SQL(", ").join(map(identifier, expression_path(connection, p))),
        "given": _given(connection, p, first=1),
        "always": _string(names(p)["always"]),
        "rows_let_through": _string(explained),
        "rows_in_all": _string(conditions.SQL["rows_in_all"].compose(names(p))),
        "passed": sql.SQL(", ").join(identifier(a.name) for a in arguments),
        "rows": sql.Literal(conditions.EXPECTED_ROWS),
        "class": share_classes.expression(sql.SQL("share")),
    }
    made = SQL["share"].compose(own)
    return [Function(p.ledger.schema_, function_of(p, "share"), arguments, [], made)]


@contextmanager
def as_in_the_function(connection: db.Connection, params: Params) -> Iterator[None]:
    """A transaction in which the names of expressions mean what they mean in the functions; rolled back."""
    path = ", ".join(identifier(schema).as_string() for schema in expression_path(connection, params))
    with db.rolled_back(connection):
        connection.execute(SQL["path"].compose({}), {"path": path.replace("%%", "%")})
        yield


def _of_words(connection: db.Connection, params: Params) -> list[Function]:
    """What hybrid asks about the words of a query, and about the weights of its halves."""
    if not params.search.has_fulltext:
        return []
    p, schema, called = params, params.ledger.schema_, words_functions(params)
    weight = WORDS["vector_weight"].compose(names(p))
    otherwise = Argument("otherwise", "double precision")
    made = [Function(schema, called["vector_weight"], [otherwise], [], weight)]
    if p.search.has_tsvector:
        arguments = [Argument("query_text", "text")]
        results = [
            Argument("place", "bigint"),
            Argument("word", "tsquery"),
            Argument("weight", "double precision"),
            Argument("lookup", "tsquery"),
        ]
        own = {
            "arguments": sql.SQL(", ").join(a.declared() for a in arguments),
            "results": sql.SQL(", ").join(a.declared() for a in results),
            "code": verbatim(sql.Literal(hybrid.CODE).as_string()),
            "code_factor": sql.Literal(hybrid.CODE_FACTOR),
            **hybrid.limits(p),
            **fulltext_names(connection, p),
        }
        text = WORDS["weigh_words"].compose({**names(p), **own})
        made.append(Function(schema, called["weigh_words"], arguments, results, text))
    return made


def _check_vector(params: Params) -> Function:
    arguments = [
        Argument("query_embedding", "real[]"),
        Argument("dimension", "integer"),
        Argument("refuses_zero", "boolean"),
    ]
    return Function(params.ledger.schema_, "check_vector", arguments, [], SQL["check_vector"].compose(names(params)))
