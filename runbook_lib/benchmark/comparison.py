"""Phases 10 and 80: the legacy search and the new ones side by side, on the same queries."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from runbook_lib.benchmark import (
    agreement,
    explain,
    legacy_calls,
    plan_diagnosis,
    relevance_measures,
    replica,
    slices,
)
from runbook_lib.benchmark.relevance_measures import Query
from runbook_lib.core import db
from runbook_lib.core.display import Table, number
from runbook_lib.core.gates import Gate, Gates, RunbookError, collect, gate
from runbook_lib.core.names import digits
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.session import register_vector
from runbook_lib.core.thresholds import apart, at_least, at_most, milliseconds, score
from runbook_lib.embeddings import embedding
from runbook_lib.migrate import tune
from runbook_lib.search import search_function
from runbook_lib.sql import load

SQL = load("compare")

# Depth of the answers that are judged: R@100 needs as many.
JUDGED_DEPTH = 100
# Each new search answers the timed queries this often, in turn, so that a slow moment hits all of them.
ROUNDS = 3
# Calls that show that the function answers as legacy does; each costs as much as a legacy search.
FUNCTION_CALLS = 20
# Rows by whose own words a legacy search is tried that has found nothing for any query.
ROWS_TO_BE_FOUND = 3
# Below this p95 a difference is noise, and no user notices it.
FAST_ENOUGH_MS = 5.0
MEASURES = ("nDCG@10", "RR", "R@10", "R@100", "P@10")
# Queries on the sheet that a person judges.
SHEET_QUERIES = 10
WITHOUT_VECTORS = ("legacy", "fulltext")
# What is kept of single queries, and shown in no table.
SINGLE = ("answers", "per_query", "first_right", "unanswered", "marks", "left")
# So many of the queries that gained most, and of those that lost most, go into the record.
MOST_MOVED = 10


def systems(phase: Phase) -> list[str]:
    """What is compared in phase 80; full text alone and hybrid only where there is full text."""
    if not phase.params.search.has_fulltext:
        return ["legacy", "exact", "vector"]
    return ["legacy", "fulltext", "exact", "vector", "hybrid"]


@contextmanager
def _connected(phase: Phase, system: str) -> Iterator[db.Connection]:
    """A fresh connection set up as that system needs it."""
    if system == "exact":
        with tune.exactly(phase) as connection:
            yield connection
    elif system in WITHOUT_VECTORS:
        with replica.connect(phase, system) as connection, connection.transaction():
            yield connection
    else:
        chosen = (phase.ledger.latest("tuning") or {}).get("chosen") or tune.settings_to_try(phase)[-1]
        with tune.through_the_index(phase, chosen) as connection:
            yield connection


def _ask(
    phase: Phase, system: str, queries: Sequence[Query], vectors: np.ndarray | None, k: int
) -> search_function.Answers:
    p = phase.params
    if system == "fulltext":
        statement = search_function.fulltext_statement(phase.connection, p)
    else:
        exact = system == "exact"
        route = "vector" if exact else system
        statement = search_function.route_statement(phase.connection, p, route, scan="exact" if exact else "index")  # type: ignore[arg-type]
    asked = None if system in WITHOUT_VECTORS else vectors

    def ask() -> search_function.Answers:
        with _connected(phase, system) as connection:
            return search_function.ask(connection, p, statement, queries, asked, k)

    return replica.again(p, ask)


@changes
def judge(phase: Phase, query_id: str, key: str, relevance: int) -> None:
    """Keeps a person's mark in the ledger: 0 for wrong, higher for better; given again, the newer one counts.

    Raises ValueError for a query that the query file does not have, or a negative mark.
    """
    if query_id not in {q.query_id for q in relevance_measures.read_queries(phase.params)} or relevance < 0:
        raise ValueError(f"query {query_id} with relevance {relevance}: needed a query of the file and a mark from 0")
    phase.ledger.append("judgement", {"query_id": query_id, "key": str(key), "relevance": relevance})


def judgements(phase: Phase) -> dict[str, dict[str, int]]:
    """Relevance by query id and key: those of the file, and over them the marks given in the notebook."""
    found = {query_id: dict(keys) for query_id, keys in relevance_measures.read_judgements(phase.params).items()}
    known = {q.query_id for q in relevance_measures.read_queries(phase.params)}
    for row in db.rows(phase.connection, SQL["judgements"], phase.params) if phase.ledger.exists() else []:
        if row["query_id"] in known:
            found.setdefault(row["query_id"], {})[row["key"]] = row["relevance"]
    return found


def measure(
    phase: Phase, systems: Sequence[str], known: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Relevance on the judged queries and latency on the timed ones, by system.

    known: relevance that was measured before, and of which queries it was. Where it holds, legacy is asked the timed
    queries alone, each once. Returns, by system: the measures, p50_ms, p95_ms, p99_ms, judged and timed (numbers of
    queries), per_query (nDCG@10), first_right (place from 1 and key of the first right answer, None without one) and
    answers (keys of the timed queries), each by query id, unanswered (ids of judged queries without any answer) and
    marks (a digest of what each query was judged by).
    """
    p, k = phase.params, phase.params.queries.k
    asked, marks = _queries(phase, (known or {}).get("legacy", {}))
    result: dict[str, dict[str, Any]] = {}
    answers: dict[str, dict[str, list[str]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    if "legacy" in systems:
        # First, since what there was no time for is asked of no other search either.
        asked, result["legacy"], answers["legacy"], seconds["legacy"] = _legacy(phase, asked, marks, known or {})
    others = [name for name in systems if name != "legacy"]
    judged_vectors = embedding.query_vectors(p, asked.judged) if others and asked.judged else None
    timed_vectors = embedding.query_vectors(p, asked.timed) if others else None
    for _ in range(ROUNDS):
        for name in others:
            found = _ask(phase, name, asked.timed, timed_vectors, k)
            answers[name] = found.keys
            seconds[name] += found.seconds
    for name in others:
        deep = _ask(phase, name, asked.judged, judged_vectors, JUDGED_DEPTH).keys if asked.judged else {}
        result[name] = _relevance(deep, marks)
    for name in systems:
        times = {
            key: round(v, 3) for key, v in relevance_measures.latency(seconds[name]).items() if key.endswith("_ms")
        }
        counts = {"judged": len(asked.judged), "timed": len(asked.timed)}
        result[name] = {**result[name], **times, **counts, "answers": answers[name]}
    return {name: result[name] for name in systems}


class _Asked(NamedTuple):
    judged: list[Query]
    timed: list[Query]

    def only(self, ids: Collection[str]) -> _Asked:
        """Those among these queries."""
        judged, timed = ([q for q in queries if q.query_id in ids] for queries in self)
        return _Asked(judged, timed)


def _queries(phase: Phase, known: Mapping[str, Any]) -> tuple[_Asked, dict[str, dict[str, int]]]:
    """The queries to ask, and the marks of the judged ones; without those that the baseline had no time for."""
    p, queries, marks = phase.params, relevance_measures.read_queries(phase.params), judgements(phase)
    judged = relevance_measures.sample([q for q in queries if q.query_id in marks], p.queries.judged_sample)
    asked = _Asked(judged, relevance_measures.sample(queries, p.queries.sample))
    left = set(known.get("left", ()))
    return asked.only({q.query_id for q in queries} - left) if left else asked, marks


def _legacy(
    phase: Phase, asked: _Asked, marks: Mapping[str, Mapping[str, int]], known: Mapping[str, Mapping[str, Any]]
) -> tuple[_Asked, dict[str, Any], dict[str, list[str]], list[float]]:
    """The legacy search asked once a query: for its answer, its time and its relevance together.

    Relevance is taken from the baseline where the marks are those of then. Returns the queries that there was time
    for, the figures of relevance, the answers to the timed queries, and the seconds of each.
    """
    k, before = phase.params.queries.k, known.get("legacy", {})
    digests = {q.query_id: digits(json.dumps(marks[q.query_id], sort_keys=True)) for q in asked.judged}
    holds = all(before.get("marks", {}).get(i) == digest for i, digest in digests.items())
    deep = set() if holds else set(digests)
    both = {q.query_id: q for q in (*asked.timed, *asked.judged) if q in asked.timed or not holds}
    depth = {i: max(k, JUDGED_DEPTH) if i in deep else k for i in both}
    found = legacy_calls.ask(phase, relevance_measures.sample(both.values(), len(both)), depth)
    answered = asked.only(found.keys)
    if not answered.timed:
        raise _no_call_ended(phase)
    # What the baseline knows of the judged queries holds, whether or not there is time to ask them again.
    asked = _Asked(asked.judged if holds else answered.judged, answered.timed)
    figures = {key: before[key] for key in (*MEASURES, "per_query", "first_right", "unanswered") if key in before}
    if not holds:
        figures = _relevance({i: keys for i, keys in found.keys.items() if i in deep}, marks)
    figures = {**figures, "marks": digests, "left": [*before.get("left", ()), *found.left]}
    keys = {q.query_id: found.keys[q.query_id][:k] for q in asked.timed}
    return asked, figures, keys, [found.seconds[q.query_id] for q in asked.timed]


def _no_call_ended(phase: Phase) -> RunbookError:
    minutes = f"{phase.params.queries.baseline_minutes:g} min (queries.baseline_minutes)"
    return RunbookError(
        found=f"not one call of the legacy search ended within {minutes}",
        needed="an answer to at least one of the queries that are timed",
        danger="without a baseline there is nothing to compare the new search with",
        do="give it more minutes, or look at the plan of legacy.query: a user would wait as long",
    )


def _relevance(deep: Mapping[str, Sequence[str]], marks: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
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


def show(result: dict[str, dict[str, Any]]) -> Table:
    """One row a system, without what stands for single queries."""
    return Table.of({"system": name, **figures} for name, figures in _totals(result).items())


def _totals(result: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures without those of single queries."""
    return {name: {k: v for k, v in figures.items() if k not in SINGLE} for name, figures in result.items()}


@changes
def baseline(phase: Phase) -> Table:
    """Phase 10: measures the legacy search and keeps its figures and its answers to the timed queries."""
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [("measure the legacy search",)])
    result = measure(phase, ["legacy"])
    legacy = result["legacy"]
    single = {key: legacy.get(key, {}) for key in SINGLE}
    own = {} if any(legacy["answers"].values()) else {"own_words": _finds_own_words(phase)}
    phase.note("baseline", {"systems": _totals(result), **single, **own})
    return show(result)


def _finds_own_words(phase: Phase) -> bool:
    """Does legacy find anything by the first line or the longest word of some rows? Then it is not broken, and that
    it finds nothing for the queries is a reason to migrate.
    """
    texts = [row["text"] for row in db.rows(phase.connection, SQL["some_texts"], phase.params, rows=ROWS_TO_BE_FOUND)]
    own = [
        words for text in texts for words in (text.strip().split("\n")[0], max(text.split(), key=len, default=text))
    ]
    queries = [Query(f"row {i}", words) for i, words in enumerate(own)]
    return any(legacy_calls.ask(phase, queries, dict.fromkeys((q.query_id for q in queries), 1)).keys.values())


def verify_baseline(phase: Phase) -> Gates:
    """The legacy search was measured, and the new function answers what it answers."""
    return collect([_baseline_is_recorded(phase), _function_answers_as_legacy(phase)])


def _baseline_is_recorded(phase: Phase) -> Gate:
    recorded = phase.ledger.latest("baseline")
    answered = sum(bool(keys) for keys in recorded["answers"].values()) if recorded else 0
    figures = recorded["systems"]["legacy"] if recorded else {}
    left = len(recorded.get("left", ())) if recorded else 0
    works = bool(recorded and recorded.get("own_words"))
    return gate(
        "compare.baseline_is_recorded",
        answered > 0 or works,
        "the legacy query",
        found=f"{answered} of {figures['timed']} queries have an answer, p50 {figures['p50_ms']} ms,"
        f" p95 {figures['p95_ms']} ms"
        + (f", nDCG@10 {figures['nDCG@10']}" if figures["judged"] else ", not judged")
        + (
            f"; {left} queries did not fit into queries.baseline_minutes and are left out from here on"
            if left
            else ""
        )
        + ("; rows are found by their own words: it works, and misses what users ask" if works else "")
        if recorded
        else "nothing",
        needed="figures, and an answer to at least one query, or to the own words of a row",
        danger="without a baseline nobody can say whether the new search is better",
        do="look at legacy.query: it finds no row even by the row's own words"
        if recorded
        else "run 10_baseline with execute: true",
        figures=figures,
    )


def _function_answers_as_legacy(phase: Phase) -> Gate:
    """Calls the function for some of the queries, and compares with what legacy answered, key by key.

    Where an answer differs, legacy is asked once more: the table may have changed since.
    """
    p = phase.params
    known = (phase.ledger.latest("baseline") or {}).get("answers", {})
    queries = [
        q
        for q in relevance_measures.sample(relevance_measures.read_queries(p), p.queries.sample)
        if q.query_id in known
    ]
    queries = queries[:FUNCTION_CALLS]
    route, share = search_function.current_route(phase)
    called = search_function.ask(phase.connection, p, search_function.call_statement(p), queries, None, p.queries.k)
    differ = [q for q in queries if called.keys[q.query_id] != known[q.query_id]]
    own = search_function.ask(phase.connection, p, search_function.legacy_statement(p), differ, None, p.queries.k)
    again = search_function.ask(phase.connection, p, search_function.call_statement(p), differ, None, p.queries.k)
    different = [q.query_id for q in differ if own.keys[q.query_id] != again.keys[q.query_id]]
    return gate(
        "compare.function_answers_as_legacy",
        not different,
        p.function_name,
        found=f"{len(queries) - len(different)} of {len(queries)} queries answered alike"
        + (f"; not {', '.join(different[:3])}" if different else "")
        + (f"; route {route} at {share} %" if route != "legacy" else ""),
        needed="all, key by key",
        danger="the application would see other answers as soon as it calls the function",
        do="give legacy.query an ORDER BY without ties (add the key), and names that its search_path resolves",
        figures={"alike": len(queries) - len(different), "asked": len(queries)},
    )


@dataclass(frozen=True)
class Comparison:
    """What phase 80 shows: every search, the classes of queries, and the sheet of the most different answers."""

    tables: tuple[Table, ...]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))


@changes
def shadow(phase: Phase) -> Comparison | Table:
    """Phase 80: every system answers the same queries; the figures and the winner go into the ledger."""
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [(f"measure {', '.join(systems(phase))}",)])
    k, route = phase.params.queries.k, phase.params.cut_over.route
    recorded = phase.ledger.latest("baseline") or {"systems": {"legacy": {}}, "per_query": {}}
    kept = {m: value for m, value in recorded["systems"]["legacy"].items() if m in MEASURES}
    kept |= {key: recorded.get(key, {}) for key in SINGLE if key != "answers"}
    result = measure(phase, systems(phase), {"legacy": kept})
    judged = result["legacy"]["judged"]
    winner = max(result, key=lambda name: result[name]["nDCG@10"]) if judged else None
    short = {
        name: sum(len(keys) < len(result["exact"]["answers"][i]) for i, keys in figures["answers"].items())
        for name, figures in result.items()
        if name in ("vector", "hybrid")
    }
    answers = {name: figures["answers"] for name, figures in result.items()}
    found = _slices(phase, result) if judged else []
    reads_index = _reads_the_index(phase)
    agreed = {name: agreement.agreement(answers["legacy"], answers[name], k) for name in result if name != "legacy"}
    phase.note(
        "shadow",
        {
            "k": k,
            "judged": judged,
            "timed": result["legacy"]["timed"],
            "winner": winner,
            "short": short,
            "vector_reads_the_index": reads_index,
            "vector_cause": None if reads_index else asdict(explain.cause_in_the_function(phase)),
            "paired": _paired(result, route) if judged else None,
            "pairs": {name: _paired(result, name) for name in agreed} if judged else {},
            "slices": found,
            "agreement_with_legacy": agreed,
            "systems": _totals(result),
            "answers": {route: answers[route]},
            "per_query": {route: result[route].get("per_query", {})},
            "moved": moved(result["legacy"], result[route]),
        },
    )
    agreed_table = Table.of(({"system": n, **a} for n, a in agreed.items()), "answers in common with legacy")
    slices_table = Table.of(found, f"legacy against {route}, by class of query (nDCG@10)")
    sheet_of = sheet(phase, answers["legacy"], answers[route])
    return Comparison((show(result), agreed_table, *([slices_table] if found else []), sheet_of))


def _reads_the_index(phase: Phase) -> bool:
    """Does the vector search read the index here, as it was asked and timed?"""
    p = phase.params
    query = relevance_measures.sample(relevance_measures.read_queries(p), p.queries.sample)[:1]
    statement = search_function.route_statement(phase.connection, p, "vector", scan="index")
    values = dict.fromkeys(p.target.filters) | {"query": query[0].text, "k": p.queries.k}
    values |= {"embedding": embedding.query_vectors(p, query)[0]}
    with _connected(phase, "vector") as connection:
        register_vector(connection)
        return tune.uses_index(connection, phase, statement, values)


def _slices(phase: Phase, result: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The judged queries by class, legacy against the route."""
    legacy, route = result["legacy"], phase.params.cut_over.route
    queries = [q for q in relevance_measures.read_queries(phase.params) if q.query_id in legacy["per_query"]]
    groups = slices.classes(phase, queries, set(legacy["unanswered"]))
    scores = {name: result[name]["per_query"] for name in result}
    return slices.compare(groups, scores, route)


def sheet(phase: Phase, old: agreement.Answers, new: agreement.Answers) -> Table:
    """The queries whose answers differ most, for a person to judge with :func:`judge`: a row an answer."""
    k = phase.params.queries.k
    texts = {q.query_id: q.text for q in relevance_measures.read_queries(phase.params)}
    ids = agreement.most_different(old, new, k, SHEET_QUERIES)
    keys = sorted({key for i in ids for key in (*old[i][:3], *new[i][:3])})
    begin = {r["key"]: r["text"] for r in db.rows(phase.connection, SQL["first_words"], phase.params, keys=keys)}
    marks = judgements(phase)
    rows = [
        (i, texts[i], side, place, key, begin.get(key, ""), marks.get(i, {}).get(key))
        for i in ids
        for side, answers in (("legacy", old), (phase.params.cut_over.route, new))
        for place, key in enumerate(answers[i][:3], 1)
    ]
    columns = ("query_id", "query", "answered by", "place", "key", "row", "relevance")
    return Table(
        columns, rows, "the most different answers; comparison.judge(phase, query_id, key, relevance) marks one"
    )


def _paired(result: dict[str, dict[str, Any]], route: str) -> dict[str, float]:
    """Route against legacy, query by query: mean difference of nDCG@10, its confidence interval and p-value."""
    found = relevance_measures.paired(result["legacy"]["per_query"], result[route]["per_query"])
    return {key: round(value, 5) for key, value in vars(found).items()}


def verify_shadow(phase: Phase) -> Gates:
    """The route that is to answer is no less relevant than legacy, no slower, and short of no rows."""
    recorded = phase.ledger.latest("shadow", phase.name)
    if recorded is None:
        missing = gate(
            "compare.searches_were_compared",
            None,
            "the query set",
            found="no comparison",
            needed="one",
            danger="readers would be moved on faith",
            do="run 80_shadow with execute: true",
        )
        return collect([missing])
    route = phase.params.cut_over.route
    return collect(
        [
            _relevance_is_kept(phase, recorded, route),
            _is_fast_enough(recorded, route, phase.params.cut_over.largest_slowdown),
            _index_pays(recorded),
            gate(
                "compare.no_query_is_short",
                recorded["short"][route] == 0,
                route,
                found=f"{recorded['short'][route]} of {recorded['timed']} queries have fewer rows than exact search",
                needed="0",
                danger="users see a short or an empty page",
                do="raise hnsw.ef_search above k, or VACUUM the table if many rows were deleted",
                figures=recorded["short"],
            ),
        ]
    )


def _relevance_is_kept(phase: Phase, recorded: dict[str, Any], route: str) -> Gate:
    allowed, unjudged = phase.params.cut_over.largest_relevance_loss, phase.params.cut_over.accept_unjudged
    new, old = recorded["systems"][route].get("nDCG@10"), recorded["systems"]["legacy"].get("nDCG@10")
    if new is None or old is None:
        return gate(
            "compare.relevance_is_kept",
            True if unjudged else None,
            route,
            found="no judgements" + (", accepted by cut_over.accept_unjudged" if unjudged else ""),
            needed="judged queries, or cut_over.accept_unjudged: true",
            danger="nobody knows whether the new answers are better or worse",
            do="judge a hundred queries into queries.judgements, or set cut_over.accept_unjudged: true in the open",
        )
    pair, losing = recorded["paired"], slices.where_legacy_wins(recorded["slices"])
    shown, needed = apart(new, old - allowed, score)
    return gate(
        "compare.relevance_is_kept",
        at_least(new, old - allowed),
        route,
        found=f"nDCG@10 {shown} on {number(recorded['judged'])} judged queries, legacy {old:.3f} (difference"
        f" {pair['low']:+.3f} to {pair['high']:+.3f}, p = {pair['p_value']:.2g}); best is {recorded['winner']}"
        + (f"; legacy wins on: {', '.join(losing)}" if losing else ""),
        needed=f"at least {needed}",
        danger="users find less than they do today",
        do="choose the best route in cut_over.route, or another model",
        figures={"new": new, "legacy": old, "judged": recorded["judged"], **pair},
    )


def _limit_ms(recorded: dict[str, Any], slowdown: float) -> float:
    return float(max(recorded["systems"]["legacy"]["p95_ms"] * slowdown, FAST_ENOUGH_MS))


def _is_fast_enough(recorded: dict[str, Any], route: str, slowdown: float) -> Gate:
    """Users feel the slow answers, so against legacy p95 counts, by the slowdown that was accepted."""
    p95 = {name: figures["p95_ms"] for name, figures in recorded["systems"].items()}
    limit = _limit_ms(recorded, slowdown)
    others = [
        f"{name} would pass (p95 {p95[name]:.2f} ms{_scored(recorded, name)})"
        for name in ("vector", "hybrid")
        if name != route and name in p95 and at_most(p95[name], limit)
    ]
    shown, most = apart(p95[route], limit, milliseconds)
    enough = p95[route] / p95["legacy"] if p95["legacy"] else 0.0
    accept = f"accept it by cut_over.largest_slowdown: {enough + 0.05:.1f}, if its answers are worth the wait"
    return gate(
        f"compare.{route}_is_not_slower_than_legacy",
        at_most(p95[route], limit),
        route,
        found=f"p95 {shown}{_scored(recorded, route)}, legacy {p95['legacy']:.2f} ms" + _scored(recorded, "legacy"),
        needed=f"at most {most}, {slowdown:g} × legacy (cut_over.largest_slowdown)"
        + (f"; below {FAST_ENOUGH_MS:g} ms a difference is noise" if limit == FAST_ENOUGH_MS else ""),
        danger="users wait longer than today",
        do="; or ".join([*(f"cut_over.route: {o}" for o in others), accept, "look at the plan in 70_tune"]),
        figures={"p95_ms": p95[route], "legacy_p95_ms": p95["legacy"]},
    )


def _scored(recorded: dict[str, Any], name: str) -> str:
    ndcg = recorded["systems"][name].get("nDCG@10")
    return "" if ndcg is None else f", nDCG@10 {ndcg:.3f}"


def _index_pays(recorded: dict[str, Any]) -> Gate:
    """That the index pays shows best in the median.

    Where the table is so small that PostgreSQL rightly answers both by reading it whole, which is faster is chance.
    Where it reads a larger one whole, the cause is named.
    """
    new, exact = (recorded["systems"][name]["p50_ms"] for name in ("vector", "exact"))
    cause = recorded.get("vector_cause") or {}
    alike = cause.get("name") == plan_diagnosis.TOO_SMALL
    shown, most = apart(new, max(exact, FAST_ENOUGH_MS), milliseconds)
    return gate(
        "compare.vector_is_not_slower_than_exact",
        alike or at_most(new, max(exact, FAST_ENOUGH_MS)),
        "vector",
        found=f"p50 {shown}, exact {exact:.2f} ms"
        + (
            "; neither reads the index: so few rows are cheaper to read as a whole"
            if alike
            else f"; vector does not read the index: {cause['found']}"
            if cause
            else ""
        ),
        needed=f"at most {most}"
        + (f" (below {FAST_ENOUGH_MS:g} ms the difference is noise)" if exact < FAST_ENOUGH_MS else ""),
        danger="the index costs writes and gains nothing",
        do=cause.get("do") or "look at the plan in 70_tune, at shared_buffers, and at the setting that was chosen",
        figures={"p50_ms": new, "exact_p50_ms": exact},
    )
