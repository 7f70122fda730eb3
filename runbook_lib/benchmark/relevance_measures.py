"""Queries, judgements, and the measures that say whether one search is better than another."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.names import names, spelled
from runbook_lib.embeddings.sources import read_json
from runbook_lib.params import Params
from runbook_lib.params.section import LONE_SURROGATE, unsound
from runbook_lib.sql import load

SQL = load("evaluate")

MEASURES = ("nDCG@10", "RR", "R@10", "R@100", "P@10")
# The measure that routes are judged by, kept for each query so that two searches can be compared pair by pair.
PAIRED_MEASURE = "nDCG@10"

# A file that is wrong throughout is not listed line by line.
MOST_PROBLEMS_SHOWN = 20
RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 500
CONFIDENCE = 0.95
# So seldom may a p95 be called too slow where it is not.
P95_DOUBT = 0.01
SEED = 20260225
SEPARATOR = "\x1f"
INTEGERS = {"smallint": 16, "integer": 32, "bigint": 64}


@dataclass(frozen=True)
class Query:
    """One representative query."""

    query_id: str
    text: str


@dataclass(frozen=True)
class Relevance:
    """Measures of one search, each a mean over all judged queries.

    measures: by the name that ir_measures knows. per_query: nDCG@10 by query id.
    """

    measures: dict[str, float]
    per_query: dict[str, float]

    @property
    def queries(self) -> int:
        return len(self.per_query)


@dataclass(frozen=True)
class Paired:
    """How much better the second search is, on the same queries.

    difference: mean of second minus first. low, high: its 95 % confidence interval. p_value: of a difference so
    large, either way, if it made no difference which search answered.
    """

    difference: float
    low: float
    high: float
    p_value: float
    queries: int


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
        else:
            lines[query_id] = line
            queries.append(Query(query_id, text))
    problems.raise_if_any()
    if not queries:
        problems.add(path, None, "no queries", "at least one query")
        problems.raise_if_any()
    return queries


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
        query_id, key, relevance = _name(record.get("query_id")), _name(record.get("key")), record.get("relevance")
        if query_id is None:
            problems.add(path, line, _found(record, "query_id"), "a query_id: text or a whole number")
        elif key is None:
            problems.add(path, line, _found(record, "key"), "a key: text or a whole number")
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
    """Gathers what is wrong with a file, so that all of it can be mended at once."""

    def __init__(self, gate_name: str) -> None:
        self.gate_name = gate_name
        self.gates: list[Gate] = []

    def add(self, path: Path, line: int | None, found: str, needed: str) -> None:
        subject = str(path) if line is None else f"{path}:{line}"
        danger = "relevance would be measured on other queries or answers than those meant; nothing was started"
        do = "mend the file and run the same command again"
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
    table = spelled(params, "table")
    key_type = str(db.one(connection, SQL["key_type"], params, table=table, key=params.target.key)["type"])
    may_be = _spelling_of(key_type)
    extra = {"key_type": sql.SQL(key_type)}  # spelt, and quoted where it must be, by format_type
    query = SQL["known_keys"].compose(names(params) | extra)
    rows = connection.execute(query, {"keys": [key for key in keys if may_be(key)]}).fetchall()
    known = {row["key"] for row in rows}
    return [key for key in keys if key not in known]


def _spelling_of(key_type: str) -> Callable[[str], bool]:
    """Whether a text can be a value of this type; one that cannot would end the whole query with an error."""

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


def relevance(
    run: Mapping[str, Sequence[str]],
    judgements: Mapping[str, Mapping[str, int]],
    measures: Sequence[str] = MEASURES,
) -> Relevance:
    """Measures of a search over all judged queries.

    run: keys by query id, best first. A judged query without an answer scores zero and is never dropped; a query
    without judgements is not looked at. A key that is answered twice fills a place the second time and counts as
    wrong. The measures are those of ir_measures (trec_eval's: linear gain, logarithmic discount).
    """
    if not judgements:
        raise ValueError("relevance needs at least one judged query")
    wanted = {name: ir_measures.parse_measure(name) for name in dict.fromkeys([*measures, PAIRED_MEASURE])}
    judged = {query_id: dict(keys) for query_id, keys in judgements.items()}
    scored = {query_id: _scores(run.get(query_id, ())) for query_id in judged}
    found: dict[Any, dict[str, float]] = {measure: dict.fromkeys(judged, 0.0) for measure in wanted.values()}
    for metric in ir_measures.iter_calc(list(found), judged, {q: s for q, s in scored.items() if s}):
        found[metric.measure][metric.query_id] = float(metric.value)
    means = {name: float(np.mean(list(found[wanted[name]].values()))) for name in measures}
    return Relevance(means, found[wanted[PAIRED_MEASURE]])


def _scores(keys: Sequence[str]) -> dict[str, float]:
    """Keys with falling scores, since ir_measures sorts by score; a repeated key gets a name that nobody judged."""
    scores: dict[str, float] = {}
    for place, key in enumerate(keys):
        scores[key if key not in scores else f"{key}{SEPARATOR}{place}"] = float(len(keys) - place)
    return scores


def paired(a: Mapping[str, float], b: Mapping[str, float]) -> Paired:
    """Compares two searches on the same queries: ``paired(old.per_query, new.per_query)``.

    p-value: paired randomisation test, two-sided (Smucker, Allan and Carterette, CIKM 2007). Interval: percentile
    bootstrap over the queries. Both resample with a fixed seed, so that a record can be worked out again. Raises
    ValueError where the queries differ.
    """
    if not a or a.keys() != b.keys():
        raise ValueError("both searches must be measured on the same queries, and on at least one")
    differences = np.array([b[query_id] - a[query_id] for query_id in sorted(a)])
    observed = float(differences.mean())
    rng = np.random.default_rng(SEED)
    n = len(differences)
    flipped = _resample(lambda size: (rng.integers(0, 2, (size, n)) * 2 - 1) @ differences / n)
    drawn = _resample(lambda size: differences[rng.integers(0, n, (size, n))].mean(axis=1))
    # The smallest rounding error must not turn "as large as" into "smaller".
    as_large = int(np.sum(np.abs(flipped) >= abs(observed) - 1e-12))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Paired(observed, float(low), float(high), (as_large + 1) / (RESAMPLES + 1), n)


def _resample(draw: Callable[[int], NDArray[np.float64]]) -> NDArray[np.float64]:
    """RESAMPLES means, a part at a time: all at once would take gigabytes for ten thousand queries."""
    return np.concatenate([draw(RESAMPLES_AT_ONCE) for _ in range(RESAMPLES // RESAMPLES_AT_ONCE)])


def overlap(a: Sequence[str], b: Sequence[str], k: int) -> float:
    """The share of the first k answers that two searches have in common; 1.0 where neither has any."""
    first, second = set(a[:k]), set(b[:k])
    longer = max(len(first), len(second))
    return len(first & second) / longer if longer else 1.0


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """p50_ms, p95_ms and p99_ms, interpolated linearly, and n. Raises ValueError where nothing was timed."""
    if not len(seconds):
        raise ValueError("no query was timed")
    p50, p95, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 95, 99])
    return {"p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99), "n": len(seconds)}


def p95_at_least(seconds: Sequence[float]) -> float | None:
    """Milliseconds that the 95th percentile exceeds with 99 % confidence, however the times are distributed.

    The r-th of n times in order is that bound where at most r - 1 of n times would lie below the 95th percentile with
    a probability of 1 % or less (Conover, Practical Nonparametric Statistics, on quantiles). None for fewer than two
    times, which say nothing.
    """
    n, rank, chance = len(seconds), 0, 0.0
    while rank < n:
        ways = math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1)
        chance += math.exp(ways + rank * math.log(0.95) + (n - rank) * math.log(0.05))
        if chance > P95_DOUBT:
            break
        rank += 1
    return sorted(seconds)[rank - 1] * 1000 if rank else None
