"""The legacy search and the new ones on the same queries: relevance where answers are judged, latency, answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from runbook_lib.benchmark import loop, query_set, relevance_measures, replica
from runbook_lib.benchmark.loop import Answers, Variant
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db, thresholds
from runbook_lib.core.display import Table, duration, number
from runbook_lib.core.gates import Gate, RunbookError, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import digits
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart, at_most
from runbook_lib.params import Params
from runbook_lib.search import statements, ways
from runbook_lib.sql import load

SQL = load("compare")

# Depth of the answers that are judged: R@100 needs as many.
JUDGED_DEPTH = 100
# Each new search answers the timed queries this often, in turn, so that a slow moment hits all of them.
ROUNDS = 3
# The legacy search is asked in those rounds too where all its timed queries together take no longer than this.
CHEAP_S = 5.0
# A p95 that is longer by no more than this is noise on a busy server, and no user notices it.
FAST_ENOUGH_MS = 5.0
MEASURES = relevance_measures.MEASURES
WITHOUT_VECTORS = ("legacy", "fulltext")
# What is kept of single queries, and shown in no table.
SINGLE = ("answers", "per_query", "first_right", "unanswered", "marks", "left")
# So many of the queries that gained most, and of those that lost most, go into the record.
MOST_MOVED = 10
# After so many calls it can be said how long the rest will take.
CALLS_BEFORE_AN_ESTIMATE = 3


def systems(phase: Phase) -> list[str]:
    """What is compared in phase 80; full text alone and hybrid only where there is full text."""
    if not phase.params.search.has_fulltext:
        return ["legacy", "exact", "vector"]
    return ["legacy", "fulltext", "exact", "vector", "hybrid"]


def variant(
    connection: db.Connection, ledger: Ledger, params: Params, system: str, queries: Sequence[Query]
) -> Variant:
    """A search that is compared, on fresh connections set up as it needs them."""
    own = system == "legacy"
    statement = statements.legacy_statement(connection, params) if own else statement_of(connection, params, system)
    return Variant(params, statement, queries, _connected(connection, ledger, params, system))


def statement_of(connection: db.Connection, params: Params, system: str) -> Callable[[Query], sql.Composed]:
    """A search as it is compared, in a transaction whose calls go by its route."""
    return loop.by_filters(lambda given: _statement(connection, params, system, given))


def _statement(connection: db.Connection, params: Params, system: str, given: tuple[str, ...]) -> sql.Composed:
    """given: the filters that have a value. The function knows how to search by these."""
    if system == "fulltext":
        return statements.fulltext_statement(connection, params, given)
    if system == "exact":
        return statements.route_statement(connection, params, "vector", scan="exact", given=given)
    if given:
        return statements.filtered_call_statement(connection, params)
    return statements.route_statement(connection, params, system, given=given)  # type: ignore[arg-type]


def _connected(
    connection: db.Connection, ledger: Ledger, params: Params, system: str
) -> Callable[[], AbstractContextManager[db.Connection]]:
    if system == "exact":
        return lambda: loop.exactly(connection, params)
    if system in WITHOUT_VECTORS:
        return lambda: _in_a_transaction(connection, params, system)
    chosen = (ledger.latest("tuning") or {}).get("chosen") or ways.candidates(params)[-1]
    return lambda: _through_the_index(connection, params, chosen, system)


@contextmanager
def _through_the_index(connection: db.Connection, params: Params, n: int, route: str) -> Iterator[db.Connection]:
    with loop.through_the_index(connection, params, n) as reader:
        statements.force_route(reader, params, route)
        yield reader


@contextmanager
def _in_a_transaction(connection: db.Connection, params: Params, purpose: str) -> Iterator[db.Connection]:
    with replica.connect(connection, params, purpose) as reader, reader.transaction():
        yield reader


@changes
def judge(phase: Phase, query_id: str, key: str | list[object], relevance: int) -> None:
    """Keeps a person's mark in the ledger: 0 for wrong, higher for better; given again, the newer one counts.

    key: as the sheet shows it; one of several columns also as a list.

    Raises ValueError for a query that the query file does not have, or a negative mark.
    """
    if query_id not in {q.query_id for q in query_set.read_queries(phase.params)} or relevance < 0:
        raise ValueError(f"query {query_id} with relevance {relevance}: needed a query of the file and a mark from 0")
    as_text = query_set.key_as_text(key) or str(key)
    phase.ledger.append("judgement", {"query_id": query_id, "key": as_text, "relevance": relevance})


def judgements(connection: db.Connection, ledger: Ledger, params: Params) -> dict[str, dict[str, int]]:
    """Relevance by query id and key: those of the file, and over them the marks given in the notebook."""
    found = {query_id: dict(keys) for query_id, keys in query_set.read_judgements(params).items()}
    known = {q.query_id for q in query_set.read_queries(params)}
    for row in db.rows(connection, SQL["judgements"], params) if ledger.exists() else []:
        if row["query_id"] in known:
            found.setdefault(row["query_id"], {})[row["key"]] = row["relevance"]
    return found


def measure(
    connection: db.Connection,
    ledger: Ledger,
    params: Params,
    systems: Sequence[str],
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Relevance on the judged queries and latency on the timed ones, by system.

    known: relevance that was measured before, and of which queries it was. Where it holds, legacy is asked the timed
    queries alone, each once; where that is cheap, it is timed again in turn with the others, so that a slow moment
    hits them all. Returns, by system: the measures, those of :func:`milliseconds`, judged and timed (numbers of
    queries), per_query (nDCG@10), first_right (place from 1 and key of the first right answer, None without one) and
    answers (keys of the timed queries), each by query id, unanswered (ids of judged queries without any answer) and
    marks (a digest of what each query was judged by).
    """
    asked, marks = sampled(connection, ledger, params, (known or {}).get("legacy"))
    result: dict[str, dict[str, Any]] = {}
    answers: dict[str, Answers] = {}
    if "legacy" in systems:
        # First, since what there was no time for is asked of no other search either.
        asked, result["legacy"], answers["legacy"] = _legacy(connection, params, asked, marks, known or {})
    names = [name for name in systems if name != "legacy"]
    if names:
        judged, timed = (query_set.with_vectors(params, queries) for queries in asked)
        others = {name: variant(connection, ledger, params, name, timed) for name in names}
        again = ["legacy"] if "legacy" in answers and sum(answers["legacy"].seconds) <= CHEAP_S else []
        cheap = {name: variant(connection, ledger, params, name, timed) for name in again}
        answers |= loop.in_rounds(cheap | others, params.queries.k, ROUNDS)
        result |= {name: relevance_figures(others[name].ask(JUDGED_DEPTH, judged).keys, marks) for name in names}
    counts = {"judged": len(asked.judged), "timed": len(asked.timed)}
    return {
        name: {**result[name], **milliseconds(answers[name]), **counts, "answers": answers[name].keys}
        for name in systems
    }


def milliseconds(answers: Answers) -> dict[str, float]:
    """p50_ms, p95_ms and p99_ms, and p95_at_least_ms, which p95 exceeds with 99 % confidence, for the ledger."""
    return {name: round(v, 3) for name, v in relevance_measures.latency(answers.seconds).items() if name != "n"}


def limit_ms(old_p95_ms: float, slowdown: float = 1.0) -> float:
    """The p95 that a new search may have. slowdown: the multiple of the old one's that was accepted."""
    return old_p95_ms * slowdown + FAST_ENOUGH_MS


def is_fast_enough(
    fact: str,
    subject: str,
    new: Mapping[str, float],
    old_p95_ms: float,
    found: Callable[[str], str],
    do: str,
    slowdown: float = 1.0,
    why: str = "",
) -> Gate:
    """Users feel the slow answers, so p95 counts. That of a few calls is that of one stray call: what fails is a p95
    that is above the limit with 99 % confidence.

    fact: the gate's name. new: as :func:`milliseconds` gives it. found: what was found, given the new p95 in words.
    why: what the limit is made of.
    """
    limit = limit_ms(old_p95_ms, slowdown)
    sure, most = apart(new.get("p95_at_least_ms", new["p95_ms"]), limit, thresholds.milliseconds)
    return gate(
        fact,
        at_most(new.get("p95_at_least_ms", new["p95_ms"]), limit),
        subject,
        found=found(f"p95 {new['p95_ms']:.2f} ms, at least {sure} with 99 % confidence"),
        needed=f"at most {most}{why}, with {FAST_ENOUGH_MS:g} ms for noise",
        danger="users wait longer than today",
        do=do,
        figures={"p95_ms": round(new["p95_ms"], 3), "old_p95_ms": round(old_p95_ms, 3)},
    )


class _Asked(NamedTuple):
    judged: list[Query]
    timed: list[Query]

    def only(self, ids: Collection[str]) -> _Asked:
        """Those among these queries."""
        judged, timed = ([q for q in queries if q.query_id in ids] for queries in self)
        return _Asked(judged, timed)


def sampled(
    connection: db.Connection, ledger: Ledger, params: Params, known: Mapping[str, Any] | None = None
) -> tuple[_Asked, dict[str, dict[str, int]]]:
    """The queries to ask, and the marks of the judged ones; without those that the baseline had no time for."""
    queries, marks = query_set.as_asked(query_set.read_queries(params)), judgements(connection, ledger, params)
    judged = query_set.sample([q for q in queries if q.query_id in marks], params.queries.judged_sample)
    asked = _Asked(judged, query_set.sample(queries, params.queries.sample))
    left = set((known or {}).get("left", ()))
    return asked.only({q.query_id for q in queries} - left) if left else asked, marks


def _legacy(
    connection: db.Connection,
    params: Params,
    asked: _Asked,
    marks: Mapping[str, Mapping[str, int]],
    known: Mapping[str, Mapping[str, Any]],
) -> tuple[_Asked, dict[str, Any], Answers]:
    """The legacy search asked once a query: for its answer, its time and its relevance together.

    Relevance is taken from the baseline where the marks are those of then. Returns the queries that there was time
    for, the figures of relevance, and the answers to the timed queries.
    """
    k, before = params.queries.k, known.get("legacy", {})
    digests = {q.query_id: digits(json.dumps(marks[q.query_id], sort_keys=True)) for q in asked.judged}
    holds = all(before.get("marks", {}).get(i) == digest for i, digest in digests.items())
    deep = set() if holds else set(digests)
    both = {q.query_id: q for q in (*asked.timed, *asked.judged) if q in asked.timed or not holds}
    depth = {i: max(k, JUDGED_DEPTH) if i in deep else k for i in both}
    found, left = ask_legacy(connection, params, query_set.sample(both.values(), len(both)), depth)
    keys = found.keys
    answered = asked.only(keys)
    if not answered.timed:
        raise _no_call_ended(params)
    # What the baseline knows of the judged queries holds, whether or not there is time to ask them again.
    asked = _Asked(asked.judged if holds else answered.judged, answered.timed)
    figures = {key: before[key] for key in (*MEASURES, "per_query", "first_right", "unanswered") if key in before}
    if not holds:
        figures = relevance_figures({i: found for i, found in keys.items() if i in deep}, marks)
    figures = {**figures, "marks": digests, "left": [*before.get("left", ()), *left]}
    return asked, figures, found.only(asked.timed, k)


def ask_legacy(
    connection: db.Connection, params: Params, queries: Sequence[Query], depth: Mapping[str, int]
) -> tuple[Answers, list[str]]:
    """Asks the legacy search each query once, in this order, for at most ``queries.baseline_minutes`` in all.

    depth: rows wanted, by query id. A call that is under way when the time is up is cancelled in the server. Returns
    the answers, and the ids of the queries that were not asked.
    """
    statement = statements.legacy_statement(connection, params)
    found: list[Answers] = []
    began = time.monotonic()
    until = began + params.queries.baseline_minutes * 60
    with replica.connect(connection, params, "legacy") as reader:

        def one(query: Query) -> Answers:
            with reader.transaction():
                left_ms = max(1, round((until - time.monotonic()) * 1000))
                reader.execute("SELECT pg_catalog.set_config('statement_timeout', %s, true)", [f"{left_ms}ms"])
                return loop.ask(reader, params, statement, [query], depth[query.query_id])

        for n, query in enumerate(queries, 1):
            if time.monotonic() >= until:
                break
            try:
                found.append(replica.again(params, lambda query=query: one(query)))  # type: ignore[misc]
            except psycopg.errors.QueryCanceled:
                if time.monotonic() < until:
                    raise
                break
            if n == CALLS_BEFORE_AN_ESTIMATE and len(queries) > n:
                a_call = (time.monotonic() - began) / n
                bound = f"at most {params.queries.baseline_minutes:g} min (queries.baseline_minutes)"
                print(f"  {number(len(queries))} legacy calls, about {duration(a_call * len(queries))}; {bound}")
    left = [q.query_id for q in queries[len(found) :]]
    if left:
        print(f"  {number(len(left))} of {number(len(queries))} queries were not asked: the time was up")
    return loop.together(found), left


def _no_call_ended(params: Params) -> RunbookError:
    minutes = f"{params.queries.baseline_minutes:g} min (queries.baseline_minutes)"
    return RunbookError(
        found=f"not one call of the legacy search ended within {minutes}",
        needed="an answer to at least one of the queries that are timed",
        danger="without a baseline there is nothing to compare the new search with",
        do="give it more minutes, or look at the plan of legacy.query: a user would wait as long",
    )


def relevance_figures(deep: Mapping[str, Sequence[str]], marks: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The measures of these answers, the score of each query, and those without an answer; empty without any."""
    if not deep:
        return {}
    relevance = relevance_measures.relevance(deep, {i: marks[i] for i in deep})
    return {m: round(relevance.measures[m], 4) for m in MEASURES} | {
        "per_query": relevance.per_query,
        "first_right": {i: _first_right(keys, marks[i]) for i, keys in deep.items()},
        "unanswered": [i for i, keys in deep.items() if not keys],
    }


def _first_right(keys: Sequence[str], marks: Mapping[str, int]) -> tuple[int, str] | None:
    return next(((place, key) for place, key in enumerate(keys, 1) if marks.get(key, 0) > 0), None)


def moved(legacy: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """How many judged queries the new search answers better and worse, and those that gained and lost most.

    Each with its query_id, the difference in nDCG@10, and the first right answer before and after, as in
    :func:`measure`. Empty where an earlier release measured legacy and kept no places.
    """
    before, after = legacy.get("first_right") or {}, new.get("first_right") or {}
    found = [
        {
            "query_id": i,
            "difference": round(new["per_query"][i] - legacy["per_query"][i], 4),
            "before": before[i],
            "after": after[i],
        }
        for i in sorted(before.keys() & after.keys())
    ]
    gains = sorted((f for f in found if f["difference"] > 0), key=lambda f: -f["difference"])
    losses = sorted((f for f in found if f["difference"] < 0), key=lambda f: f["difference"])
    counts = {"better": len(gains), "worse": len(losses), "alike": len(found) - len(gains) - len(losses)}
    return {**counts, "gains": gains[:MOST_MOVED], "losses": losses[:MOST_MOVED]} if found else {}


def per_query(phase: Phase) -> Table:
    """Each judged query: nDCG@10 of legacy and of the new route, by what was
    measured last in 10_baseline and 80_shadow. Best gains first."""
    route = phase.params.cut_over.route
    before, after = (phase.ledger.latest(kind) or {} for kind in ("baseline", "shadow"))
    old, new = before.get("per_query", {}), after.get("per_query", {}).get(route, {})
    texts = {q.query_id: q.text for q in query_set.read_queries(phase.params)} if old else {}
    rows = [(i, texts.get(i), old[i], new[i], new[i] - old[i]) for i in old.keys() & new.keys()]
    return Table(
        ("query_id", "query", "legacy", route, "difference"),
        sorted(rows, key=lambda row: (-row[-1], row[0])),
        f"nDCG@10 of every judged query, legacy and {route}",
    )


def show(result: dict[str, dict[str, Any]]) -> Table:
    """One row a system, without what stands for single queries."""
    return Table.of({"system": name, **figures} for name, figures in totals(result).items())


def totals(result: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures without those of single queries."""
    return {name: {k: v for k, v in figures.items() if k not in SINGLE} for name, figures in result.items()}
