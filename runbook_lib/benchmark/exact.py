"""Exact answers for many queries at once: the vectors are streamed out once and multiplied block by block.

PostgreSQL reads the whole table for every exact query; here it is read once for all of them, in memory that depends
on the number of queries and not on the table.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from runbook_lib.benchmark import replica
from runbook_lib.benchmark.query_set import Query, exact_of, vector_of, with_exact
from runbook_lib.benchmark.recall_at_k import SAME_DISTANCE, Nearest
from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import has_chunks, key_of, literal, names, verbatim
from runbook_lib.core.session import register_vector
from runbook_lib.params import Params
from runbook_lib.search import conditions, statements
from runbook_lib.sql import key, load

SQL = load("exact")

BLOCK_BYTES = 8 * 1024 * 1024
DISTANCE_BYTES = 64 * 1024 * 1024
# COPY's binary format: signature, flags, extension length; the trailer is a field count of -1.
HEADER = b"PGCOPY\n\xff\r\n\0"
HEADER_BYTES = len(HEADER) + 8
# Distances nearer than this are ties, which the key decides; single precision does not tell them apart. For vectors
# at length 1: those of a longer question are rounded by its length.
DECIMALS = 6
# How far two may differ that sum the same products in another order, relative to a distance.
RELATIVE_TOLERANCE = 1e-4
CHECKED = 5
# Rows kept beyond the k nearest, as a multiple of k: deletes that come before the answers are compared.
RESERVE = 1
# Bits of a number that COPY sends, without the sign.
BITS = 31
COMPONENT = {"vector": ">f4", "halfvec": ">f2"}
KEY_TYPES = {"smallint": ">i2", "integer": ">i4", "bigint": ">i8"}
FLOAT = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class VectorBlock:
    """A part of the table: vectors, shape (rows, dimension); codes, shape (rows, codes), a bit for each condition of
    :class:`_Conditions`; keys.
    """

    vectors: FLOAT
    codes: NDArray[np.int32]
    keys: NDArray[Any]


@contextmanager
def snapshot(connection: db.Connection, params: Params) -> Iterator[db.Connection]:
    """A fresh connection whose statements all see the table as it is at one moment."""
    with replica.connect(connection, params, "exact") as reader, reader.transaction():
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield reader


def answered(connection: db.Connection, params: Params, queries: Sequence[Query], k: int) -> list[Query]:
    """The queries with their exact answers, the k nearest rows that their filters let through.

    queries: with vectors; those of one query_id have the same. connection: in a transaction, where the answers must
    fit those of other statements. Memory: a few times BLOCK_BYTES and DISTANCE_BYTES, and some k rows a query.
    """
    return with_exact(queries, nearest(connection, params, queries, k))


def nearest(connection: db.Connection, params: Params, queries: Sequence[Query], k: int) -> list[Nearest]:
    """The answers alone, in the order of the queries."""
    asked = _Conditions(queries)
    known = {q.query_id: vector_of(q) for q in queries}
    if not known:
        return []
    vectors = np.asarray(list(known.values()), np.float32)
    if params.vector.type == "halfvec":
        # The server casts the query to the column's type.
        vectors = vectors.astype(np.float16).astype(np.float32)
    place = {query_id: i for i, query_id in enumerate(known)}
    chunks = has_chunks(params)
    tops = [_Top(group, k + RESERVE * k, chunks) for group in _groups(queries, place, asked)]
    numbers = _distances(params.vector.distance, vectors)
    longest = 0.0
    for block in _small_enough(blocks(connection, params, asked), len(vectors)):
        distances = numbers(block.vectors)
        longest = max(longest, _longest(block.vectors))
        if chunks:
            distances, block = _by_row(distances, block)
        for top in tops:
            top.add(distances, block)
    answers: dict[int, Nearest] = {}
    for top in tops:
        answers |= top.answers()
    lengths = [float(np.linalg.norm(vectors[place[q.query_id]])) for q in queries]
    return [_with_tolerance(params, _split(answers[i], k), lengths[i], longest) for i in range(len(queries))]


def _split(found: Nearest, k: int) -> Nearest:
    """The k nearest, and the others in reserve."""
    return replace(found, keys=found.keys[:k], distances=found.distances[:k], reserve=found.keys[k:])


def _longest(vectors: FLOAT) -> float:
    return math.sqrt(float(np.einsum("ij,ij->i", vectors, vectors).max(initial=0.0)))


def _with_tolerance(params: Params, found: Nearest, length: float, longest: float) -> Nearest:
    """By what the arithmetic loses. length: of the question's vector. longest: the longest row's."""
    if params.vector.distance == "cosine" or not found.distances:
        return found
    lost = 10**-DECIMALS * length * (longest if params.vector.distance == "inner_product" else 1.0)
    return replace(found, same=max(SAME_DISTANCE * max(map(abs, found.distances)), lost))


def _small_enough(whole: Iterator[VectorBlock], queries: int) -> Iterator[VectorBlock]:
    """The blocks, cut so that their distances to so many queries take at most DISTANCE_BYTES."""
    rows = max(1, DISTANCE_BYTES // (np.dtype(np.float64).itemsize * max(queries, 1)))
    for block in whole:
        for i in range(0, len(block.keys), rows):
            part = slice(i, i + rows)
            yield VectorBlock(block.vectors[part], block.codes[part], block.keys[part])


def _by_row(distances: FLOAT, block: VectorBlock) -> tuple[FLOAT, VectorBlock]:
    """Of chunks, the nearest of each row that has some in the block. The last code counts rows: it is that of the
    row's first chunk, wherever that is."""
    order = np.argsort(block.keys, kind="stable")
    keys = block.keys[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.empty(0, np.intp)
    if not len(first):
        return distances, block
    codes = block.codes[order[first]]
    codes[:, -1] = np.add.reduceat(block.codes[order, -1], first)
    nearest_of_row = np.minimum.reduceat(distances[:, order], first, axis=1)
    return nearest_of_row, VectorBlock(block.vectors[:0], codes, keys[first])


class _Conditions:
    """Each filter with each requested value, as a bit of one of the numbers that are read with every row."""

    def __init__(self, questions: Iterable[Query]) -> None:
        self.all = sorted({condition for q in questions for condition in q.allowed})
        self.place = {condition: divmod(i, BITS) for i, condition in enumerate(self.all)}

    @property
    def numbers(self) -> list[list[tuple[str, str]]]:
        """Conditions, one list per number."""
        return [self.all[i : i + BITS] for i in range(0, len(self.all), BITS)]


@dataclass(frozen=True)
class _Group:
    """Questions with the same filters: their positions, the indexes of their vectors, and the bit of each
    condition."""

    places: NDArray[np.intp]
    queries: NDArray[np.intp]
    wanted: tuple[tuple[int, int], ...]


def _groups(questions: Sequence[Query], place: Mapping[str, int], asked: _Conditions) -> Iterator[_Group]:
    for allowed in dict.fromkeys(q.allowed for q in questions):
        places = [i for i, q in enumerate(questions) if q.allowed == allowed]
        wanted = tuple(asked.place[condition] for condition in allowed)
        yield _Group(np.array(places), np.array([place[questions[i].query_id] for i in places]), wanted)


class _Top:
    """The nearest rows of a group of questions so far. chunks: one row may come in several blocks."""

    def __init__(self, group: _Group, k: int, chunks: bool = False) -> None:
        self.group, self.k, self.chunks, self.matching = group, k, chunks, 0
        self.limit = np.full(len(group.places), np.inf)
        self.owner: NDArray[Any] = np.empty(0, np.intp)
        self.distance: NDArray[Any] = np.empty(0)
        self.key: NDArray[Any] | None = None

    def add(self, distances: FLOAT, block: VectorBlock) -> None:
        """Takes in the rows of a block that are no farther than the k-th found so far."""
        rows = np.arange(len(block.keys))
        for number, bit in self.group.wanted:
            rows = rows[(block.codes[rows, number] >> bit) & 1 == 1]
        self.matching += int(block.codes[rows, -1].sum()) if self.chunks else len(rows)
        if not len(rows):
            return
        whole = not self.group.wanted and len(self.group.queries) == len(distances)
        near = distances if whole else distances[np.ix_(self.group.queries, rows)]
        limit = self.limit
        if len(rows) > self.k and np.isinf(limit).any():
            limit = np.minimum(limit, np.partition(near, self.k - 1, axis=1)[:, self.k - 1])
        owner, place = np.nonzero(near <= limit[:, None])
        self._merge(owner, near[owner, place], block.keys[rows[place]])

    def _merge(self, owner: NDArray[Any], distance: NDArray[Any], key: NDArray[Any]) -> None:
        owner, distance = np.concatenate([self.owner, owner]), np.concatenate([self.distance, distance])
        key = key if self.key is None else np.concatenate([self.key, key])
        if self.chunks:
            order = np.lexsort((distance, key, owner))
            owner, distance, key = owner[order], distance[order], key[order]
            new = np.concatenate([[True], (owner[1:] != owner[:-1]) | (key[1:] != key[:-1])])[: len(owner)]
            owner, distance, key = owner[new], distance[new], key[new]
        order = np.lexsort((key, distance, owner))
        owner, distance, key = owner[order], distance[order], key[order]
        first = np.searchsorted(owner, owner, side="left")
        kept = np.arange(len(owner)) - first < self.k
        self.owner, self.distance, self.key = owner[kept], distance[kept], key[kept]
        full = np.flatnonzero(np.bincount(self.owner, minlength=len(self.limit)) == self.k)
        self.limit[full] = self.distance[np.searchsorted(self.owner, full, side="right") - 1]

    def answers(self) -> dict[int, Nearest]:
        """By place of the question."""
        found = {}
        for i, place in enumerate(self.group.places):
            first, end = np.searchsorted(self.owner, [i, i + 1])
            # Those without a distance come last.
            mine = slice(first, first + np.isfinite(self.distance[first:end]).sum())
            keys = () if self.key is None else tuple(str(x) for x in self.key[mine])
            found[int(place)] = Nearest(keys, tuple(float(x) for x in self.distance[mine]), self.matching)
        return found


def _distances(distance: str, queries: FLOAT) -> Callable[[FLOAT], FLOAT]:
    """A function from a block of vectors to their distances, shape (queries, rows), as pgvector's operator has them.

    A row without a distance (a zero vector under cosine) is infinitely far.
    """
    if distance == "cosine":
        own = _at_length_one(np.asarray(queries, np.float32))
        return lambda block: _rounded(1 - own @ _at_length_one(block).T)
    lengths = np.linalg.norm(np.asarray(queries, np.float64), axis=1, keepdims=True)
    unit = np.where(lengths > 0, lengths, 1.0)
    if distance == "inner_product":
        own, unit = (queries / unit).astype(np.float32), unit.astype(np.float32)
        return lambda block: _rounded(-(own @ block.T)) * unit
    # In double precision: the difference of large squares leaves nothing of a small distance in single.
    wide = np.asarray(queries, np.float64)
    squares = (wide**2).sum(axis=1)[:, None]

    def l2(block: FLOAT) -> FLOAT:
        b = block.astype(np.float64)
        return _rounded(np.sqrt(np.maximum(squares + (b**2).sum(axis=1) - 2 * wide @ b.T, 0)) / unit) * unit

    return l2


def _at_length_one(vectors: FLOAT) -> FLOAT:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: FLOAT = vectors / lengths
    return result


def _rounded(distances: FLOAT) -> FLOAT:
    np.round(distances, DECIMALS, out=distances)
    distances[np.isnan(distances)] = np.inf
    return distances


def blocks(connection: db.Connection, params: Params, asked: _Conditions) -> Iterator[VectorBlock]:
    """The rows that have a vector and may be found, block by block."""
    key_type, codes = key.type_of_one(db.key_types(connection, params)), len(asked.numbers) + has_chunks(params)
    layout = _Layout(params.vector.type, params.vector.dimension, codes, key_type)
    held: list[bytes] = []
    size = 0
    with connection.cursor() as cursor, cursor.copy(_copy_out(connection, params, asked)) as copy:
        for data in copy:
            held.append(bytes(data))
            size += len(data)
            if size >= BLOCK_BYTES:
                block, rest = layout.read(b"".join(held))
                held, size = [rest], len(rest)
                yield block
    block, _ = layout.read(b"".join(held))
    yield block


def _copy_out(connection: db.Connection, params: Params, asked: _Conditions) -> sql.Composed:
    bit = sql.SQL("((({}) IS TRUE)::integer << {})")
    filters = {f.name: f for f in params.target.each_filter}
    numbers = []
    for number in asked.numbers:
        literals = [(name, literal(value)) for name, value in number]
        held = [conditions.holds(connection, params, filters[name], value) for name, value in literals]
        bits = sql.SQL(" | ").join(bit.format(c, sql.Literal(i)) for i, c in enumerate(held))
        numbers.append(sql.SQL("({}), ").format(bits))
    if has_chunks(params):
        numbers.append(sql.SQL("(e.{} = 0)::integer, ").format(names(params)["chunk"]))
    parts = {n: names(params)[n] for n in ("row_embedding", "from_all_vectors", "always")}
    parts |= {"key": key_of(params).written("one t.key"), "codes": sql.Composed(numbers)}
    # COPY takes no bound values, so nothing here is read for placeholders; the block has no literal per cent sign.
    plain = {n: sql.SQL(part.as_string(connection).replace("%%", "%")) for n, part in parts.items()}
    return SQL["copy_out"].compose(plain)


class _Layout:
    """How a row of COPY's binary format is laid out: field count, codes, vector, key; each after its length."""

    def __init__(self, kind: str, dimension: int, codes: int, key_type: str) -> None:
        component = np.dtype(COMPONENT[kind])
        fields: list[Any] = [("fields", ">i2")]
        fields += [("codes", [("length", ">i4"), ("code", ">i4")], (codes,))] if codes else []
        fields += [("vector_length", ">i4"), ("header", ">i4"), ("vector", component, (dimension,))]
        fields += [("key_length", ">i4")]
        self.head = np.dtype(fields)
        self.codes = codes
        self.vector_length = 4 + component.itemsize * dimension
        self.number = np.dtype(KEY_TYPES[key_type]) if key_type in KEY_TYPES else None
        self.spell: Callable[[bytes], str] = _uuid if key_type == "uuid" else bytes.decode
        self.started = False

    def read(self, data: bytes) -> tuple[VectorBlock, bytes]:
        """The whole rows in it, and the beginning of one that is not whole yet."""
        at = 0 if self.started else HEADER_BYTES
        self.started = True
        if self.number is not None:
            row = np.dtype([*self.head.descr, ("key", self.number)])
            rows = np.frombuffer(data, row, (len(data) - at) // row.itemsize, at)
            keys = rows["key"].astype(np.int64)
            rest = data[at + rows.nbytes :]
        else:
            rows, keys, rest = self._of_any_length(data, at)
        if len(rows) and not (rows["vector_length"] == self.vector_length).all():
            raise ValueError("COPY sent rows of another layout than the vector column's type and dimension")
        codes = rows["codes"]["code"] if self.codes else np.empty((len(rows), 0))
        return VectorBlock(rows["vector"].astype(np.float32), codes.astype(np.int32), keys), rest

    def _of_any_length(self, data: bytes, at: int) -> tuple[NDArray[Any], NDArray[Any], bytes]:
        head, heads, keys = self.head.itemsize, [], []
        while len(data) - at >= head:
            end = at + head + int.from_bytes(data[at + head - 4 : at + head], "big")
            if end > len(data):
                break
            heads.append(data[at : at + head])
            keys.append(self.spell(data[at + head : end]))
            at = end
        return np.frombuffer(b"".join(heads), self.head), np.array(keys, dtype=str), data[at:]


def _uuid(data: bytes) -> str:
    return str(uuid.UUID(bytes=data))


def stream_agrees_with_sql(connection: db.Connection, params: Params, queries: Sequence[Query], k: int) -> Gate:
    """Gate: plain SQL gives the same distances, in order, to a few of the queries, spread over them."""
    register_vector(connection)
    n = min(CHECKED, len(queries))
    chosen = [queries[i * (len(queries) - 1) // max(n - 1, 1)] for i in range(n)]
    alike = sum(_alike(by_sql(connection, params, q, k), exact_of([q])[0]) for q in chosen)
    return agreement(params, alike, n)


def agreement(params: Params, alike: int, n: int) -> Gate:
    """The gate, from how many questions were answered alike."""
    return gate(
        "exact.stream_agrees_with_sql",
        alike == n if n else None,
        f"{params.target.schema_}.{params.target.table}",
        found=f"{alike} of {n} questions answered alike, each to the last distance",
        needed="all of them",
        danger="recall would be measured against answers that are not exact",
        do="run 70_tune again when the table is not being written to; if it stays, report this with the versions of"
        " pgvector and numpy",
        figures={"asked": n, "alike": alike},
    )


def by_sql(
    connection: db.Connection, params: Params, query: Query, k: int, among: Sequence[str] | None = None
) -> list[db.Row]:
    """The same by plain SQL: key (as text) and distance of the k nearest rows, of all or of these keys."""
    filters, n = {f.name: f for f in params.target.each_filter}, names(params)
    held = [
        conditions.holds(connection, params, filters[name], sql.Placeholder(f"allowed_{i}"))
        for i, (name, _) in enumerate(query.allowed)
    ]
    vector = sql.SQL("%(vector)s::{}").format(n["vector_type"])
    if among is not None:
        kind = {"key_type": verbatim(db.key_types(connection, params)[0])}
        held.append(key_of(params).written("t.key IN typed %among", kind))
    statement = SQL["nearest"].compose(
        n
        | statements.nearest_chunk_of_each_row(params, vector)
        | {
            "query_vector": vector,
            "filters": sql.SQL(" AND ").join([n["always"], *held]),
        }
    )
    allowed = {f"allowed_{i}": value for i, (_, value) in enumerate(query.allowed)}
    values = {"vector": query.vector, "k": k, "among": list(among or ()), **allowed}
    return connection.execute(statement, values, prepare=False).fetchall()


def seconds_by_sql(connection: db.Connection, params: Params, queries: Sequence[Query], k: int) -> list[float]:
    """Seconds of a few exact queries by plain SQL, without a filter; one before them warms the cache."""
    register_vector(connection)
    seconds = []
    for i in range(min(CHECKED, len(queries)) + 1):
        query = replace(queries[i % len(queries)], allowed=())
        started = time.perf_counter()
        by_sql(connection, params, query, k)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _alike(rows: Sequence[db.Row], found: Nearest) -> bool:
    """Keys may differ where distances do not: single precision sums in another order."""
    expected = np.array([row["distance"] for row in rows if not np.isnan(row["distance"])])
    return len(expected) == len(found.keys) and bool(
        np.allclose(expected, found.distances, RELATIVE_TOLERANCE, found.same)
    )
