"""The queries of the query file, with their judgements, vectors and exact answers."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from runbook_lib.benchmark.recall_at_k import Nearest
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.names import names
from runbook_lib.embeddings import embedding
from runbook_lib.embeddings.sources import as_array, read_json
from runbook_lib.params import Params
from runbook_lib.params.section import LONE_SURROGATE, unsound
from runbook_lib.search import combined_filters
from runbook_lib.sql import key, load

SQL = load("evaluate")

# A file that is wrong throughout is not listed line by line.
MOST_PROBLEMS_SHOWN = 20
INTEGERS = {"smallint": 16, "integer": 32, "bigint": 64}


@dataclass(frozen=True)
class Query:
    """One query, as a search gets it.

    vector: shape (dimension,); None for a search that needs none. allowed: by filter, its value as PostgreSQL reads
    it; empty for every row. filters: what the query file says that it came with, likewise. own_key: the row that the
    query was made from, which counts for none of its answers. exact: its exact answers, if recall is measured.
    """

    query_id: str
    text: str
    vector: NDArray[Any] | None = field(default=None, compare=False)
    allowed: tuple[tuple[str, str], ...] = ()
    filters: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    own_key: str | None = None
    exact: Nearest | None = field(default=None, compare=False)


def of_rows(rows: Iterable[db.Row], *, counted: bool = False) -> list[Query]:
    """Rows of the table, each with its ``key`` (as text) and ``embedding``, that stand in for queries.

    counted: each counts as an answer to its own query.
    """
    return [
        Query(f"row {row['key']}", "", as_array(row["embedding"]), own_key=None if counted else row["key"])
        for row in rows
    ]


def with_vectors(params: Params, queries: Sequence[Query]) -> list[Query]:
    """The same queries, each with its vector. Raises BadInput where there is no source of them."""
    vectors = embedding.query_vectors(params, queries) if queries else ()
    return [replace(q, vector=np.asarray(v)) for q, v in zip(queries, vectors, strict=True)]


def as_asked(queries: Iterable[Query]) -> list[Query]:
    """The same queries with the filters that the query file gives them, as the application asks them."""
    return [replace(q, allowed=q.filters) for q in queries]


def vector_of(query: Query) -> NDArray[Any]:
    """Its vector. Raises ValueError where it has none."""
    if query.vector is None:
        raise ValueError(f"query {query.query_id} has no vector")
    return query.vector


def exact_of(queries: Sequence[Query]) -> list[Nearest]:
    """Their exact answers. Raises ValueError where one has none."""
    found = [q.exact for q in queries if q.exact is not None]
    if len(found) < len(queries):
        raise ValueError("recall needs the exact answers of every query")
    return found


def with_exact(queries: Sequence[Query], exact: Sequence[Nearest]) -> list[Query]:
    """The same queries, each with its exact answers."""
    return [replace(q, exact=nearest) for q, nearest in zip(queries, exact, strict=True)]


def read_queries(params: Params) -> list[Query]:
    """The queries, in the order of the file.

    Raises BadInput that names file and line of what is not a query, and of a query_id that occurs twice.
    """
    path, problems = params.queries.file, _Problems("evaluate.queries_are_readable")
    lines: dict[str, int] = {}
    queries = []
    for line, record in _records(path, problems, needed='{"query_id": …, "text": …}'):
        query_id, text = _name(record.get("query_id")), record.get("text")
        if query_id is None:
            problems.add(path, line, _found(record, "query_id"), "a query_id: text or a whole number")
        elif not isinstance(text, str) or not text.strip():
            problems.add(path, line, _found(record, "text"), "a text that is not empty")
        elif unsound(text):
            problems.add(path, line, f"text: {unsound(text)}", "a text that can be stored in UTF-8")
        elif query_id in lines:
            problems.add(path, line, f"query_id {query_id} again, as in line {lines[query_id]}", "each query_id once")
        elif wrong := _wrong_filters(params, record.get("filters")):
            problems.add(path, line, f"filters: {wrong}", "an object with values for the names in target.filters")
        else:
            lines[query_id] = line
            queries.append(Query(query_id, text, filters=_allowed(params, record.get("filters") or {})))
    problems.raise_if_any()
    if not queries:
        problems.add(path, None, "no queries", "at least one query")
        problems.raise_if_any()
    return queries


def _wrong_filters(params: Params, given: object) -> str:
    """What is wrong with the filters of a query; empty if nothing is."""
    if given is None:
        return ""
    if not isinstance(given, dict):
        return f"a JSON {type(given).__name__}"
    unknown = [ascii(name)[1:-1] for name in given if name not in params.target.filters]
    return f"{', '.join(unknown)} not among target.filters" if unknown else ""


def _allowed(params: Params, given: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """The filters in the order of the parameters, as PostgreSQL reads their values; null lets every row through."""
    names_given = [name for name in params.target.filters if given.get(name) is not None]
    return tuple((name, combined_filters.text_of(given[name])) for name in names_given)


def read_judgements(params: Params) -> dict[str, dict[str, int]]:
    """Relevance by query id and key (as text), 0 for judged and wrong; empty where the parameters name no file.

    Raises BadInput that names file and line of what is not a judgement, of a row judged twice for one query, and of
    a query_id that the query file does not have.
    """
    path = params.queries.judgements
    if path is None:
        return {}
    known = {query.query_id for query in read_queries(params)}
    problems = _Problems("evaluate.judgements_are_readable")
    judgements: dict[str, dict[str, int]] = {}
    for line, record in _records(path, problems, needed='{"query_id": …, "key": …, "relevance": …}'):
        query_id, key, relevance = (
            _name(record.get("query_id")),
            key_as_text(record.get("key")),
            record.get("relevance"),
        )
        if query_id is None:
            problems.add(path, line, _found(record, "query_id"), "a query_id: text or a whole number")
        elif key is None:
            problems.add(path, line, _found(record, "key"), "a key: text or a whole number, or a list of them")
        elif isinstance(relevance, bool) or not isinstance(relevance, int) or relevance < 0:
            problems.add(path, line, _found(record, "relevance"), "a relevance: a whole number from 0")
        elif query_id not in known:
            problems.add(path, line, f"query_id {query_id}", f"a query_id of {params.queries.file.name}")
        elif key in judgements.get(query_id, {}):
            problems.add(path, line, f"query {query_id} and key {key} again", "each row judged once for a query")
        else:
            judgements.setdefault(query_id, {})[key] = relevance
    problems.raise_if_any()
    return judgements


class _Problems:
    """Gathers what is wrong with a file, so that all of it can be fixed at once."""

    def __init__(self, gate_name: str) -> None:
        self.gate_name = gate_name
        self.gates: list[Gate] = []

    def add(self, path: Path, line: int | None, found: str, needed: str) -> None:
        subject = str(path) if line is None else f"{path}:{line}"
        danger = "relevance would be measured on other queries or answers than those meant; nothing was started"
        do = "fix the file and rerun the same command"
        self.gates.append(Gate(self.gate_name, Verdict.FAIL, subject, found, needed, danger, do))

    def raise_if_any(self) -> None:
        if self.gates:
            raise BadInput(self.gates[:MOST_PROBLEMS_SHOWN])


def _records(path: Path, problems: _Problems, needed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, counted from 1, and the objects in them; empty lines are passed over."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        problems.add(path, None, error.strerror or "unreadable", f"JSON lines: {needed}")
        return
    except UnicodeDecodeError as error:
        problems.add(path, None, f"not UTF-8 at byte {error.start}", f"JSON lines in UTF-8: {needed}")
        return
    # Not splitlines(): JSON allows other line separators inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record, fault = read_json(line)
        if isinstance(record, dict):
            yield number, record
        else:
            problems.add(path, number, fault or f"a JSON {type(record).__name__}", needed)


def _name(value: object) -> str | None:
    """A key or a query id as text; None for what is neither text nor a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return None if unsound(str(value)) else str(value)


def key_as_text(value: object) -> str | None:
    """A key as text; None for what is none. A list holds one of several columns."""
    if not isinstance(value, list):
        return _name(value)
    return None if not value or any(_name(v) is None for v in value) else key.text_of(value)


def _found(record: Mapping[str, Any], field: str) -> str:
    if field not in record:
        return f"no {field}, but {', '.join(ascii(k)[1:-1] if unsound(k) else k for k in record) or 'nothing'}"
    value = record[field]
    if isinstance(value, str) and (why := unsound(value)):
        return f"{field}: {why}"
    return f"{field}: {json.dumps(value, ensure_ascii=bool(LONE_SURROGATE.search(str(value))))}"


def unknown_keys(
    connection: db.Connection, params: Params, judgements: Mapping[str, Mapping[str, int]] | None = None
) -> list[str]:
    """Judged keys that the table does not hold, in the order of the judgements; read from the file if not given.

    A key spelt otherwise than PostgreSQL spells it (``007``, an upper-case uuid) is unknown too: no search will ever
    answer it. Raises psycopg.Error where the keys cannot be compared.
    """
    if judgements is None:
        judgements = read_judgements(params)
    keys = list(dict.fromkeys(key for judged in judgements.values() for key in judged))
    if not keys:
        return []
    kinds = db.key_types(connection, params)
    may_be = _spelling_of(kinds)
    extra = {"key_type": sql.SQL(kinds[0])}  # spelt, and quoted where it must be, by format_type
    query = SQL["known_keys"].compose(names(params) | extra)
    rows = connection.execute(query, {"keys": [key for key in keys if may_be(key)]}).fetchall()
    known = {row["key"] for row in rows}
    return [key for key in keys if key not in known]


def _spelling_of(key_types: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text can be a key of these types; one that cannot would end the whole query with an error."""
    if len(key_types) == 1:
        return _spelling_of_a_column(key_types[0])
    columns = [_spelling_of_a_column(kind) for kind in key_types]

    def several(text: str) -> bool:
        values = read_json(text)[0]
        fit = isinstance(values, list) and len(values) == len(columns)
        return fit and all(is_one(str(value)) for is_one, value in zip(columns, values, strict=True))

    return several


def _spelling_of_a_column(key_type: str) -> Callable[[str], bool]:

    def integer(key: str) -> bool:
        limit = 2 ** (INTEGERS[key_type] - 1)
        is_number = key.removeprefix("-").isdecimal() and key.isascii() and len(key) <= len(str(-limit))
        return is_number and -limit <= int(key) < limit

    def is_uuid(key: str) -> bool:
        try:
            return str(uuid.UUID(key)) == key
        except ValueError:
            return False

    if key_type in INTEGERS:
        return integer
    if key_type == "uuid":
        return is_uuid
    return lambda key: "\0" not in key


def sample(queries: Iterable[Query], n: int) -> list[Query]:
    """At most n queries by the hash of their id: the same each time, and a smaller sample lies within a larger."""
    return sorted(queries, key=lambda q: hashlib.sha256(q.query_id.encode()).digest())[:n]
