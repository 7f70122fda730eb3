"""Phases 10 and 80: the legacy search and the new ones side by side, on the same queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from runbook_lib import db, embed, evaluate, search, tune
from runbook_lib.display import Table, number
from runbook_lib.evaluate import Query
from runbook_lib.gates import Gate, Gates, collect, gate
from runbook_lib.phase import Phase

# Depth of the answers that are judged: R@100 needs as many.
JUDGED_DEPTH = 100
# Each system answers the timed queries this often, in turn, so that a slow moment hits all of them.
ROUNDS = 3
# Below this p95 a difference is noise, and no user notices it.
FAST_ENOUGH_MS = 5.0
MEASURES = ("nDCG@10", "RR", "R@10", "R@100", "P@10")


def systems(phase: Phase) -> list[str]:
    """What is compared in phase 80; hybrid only where there is a full-text column."""
    return ["legacy", "exact", "vector", *(["hybrid"] if phase.params.search.fulltext_column else [])]


@contextmanager
def _connected(phase: Phase, system: str) -> Iterator[db.Connection]:
    """A fresh connection set up as that system needs it."""
    if system == "exact":
        with tune.exactly(phase) as connection:
            yield connection
    elif system == "legacy":
        with db.connect(phase.params, f"runbook {phase.run_id} legacy") as connection, connection.transaction():
            yield connection
    else:
        chosen = (phase.ledger.latest("tuning") or {}).get("chosen") or tune.settings_to_try(phase)[-1]
        with tune.through_the_index(phase, chosen) as connection:
            yield connection


def _ask(phase: Phase, system: str, queries: Sequence[Query], vectors: np.ndarray | None, k: int) -> search.Answers:
    route = "vector" if system == "exact" else system
    statement = search.route_statement(phase.connection, phase.params, route)  # type: ignore[arg-type]
    with _connected(phase, system) as connection:
        return search.ask(connection, phase.params, statement, queries, None if system == "legacy" else vectors, k)


def measure(
    phase: Phase, names: Sequence[str], known: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Relevance on the judged queries and latency on the timed ones, by system.

    known: relevance that was measured before and is not measured again. Returns, by system: the measures, p50_ms,
    p95_ms, p99_ms, judged and timed (numbers of queries), per_query (nDCG@10) and answers (keys of the timed
    queries), both by query id.
    """
    p = phase.params
    queries, judgements = evaluate.read_queries(p), evaluate.read_judgements(p)
    judged = evaluate.sample([q for q in queries if q.query_id in judgements], p.queries.judged_sample)
    timed = evaluate.sample(queries, p.queries.sample)
    model = embed.model(p) if set(names) != {"legacy"} else None
    judged_vectors = model([q.text for q in judged]) if model and judged else None
    timed_vectors = model([q.text for q in timed]) if model else None
    seconds: dict[str, list[float]] = {name: [] for name in names}
    answers: dict[str, search.Answers] = {}
    for _ in range(ROUNDS):
        for name in names:
            answers[name] = _ask(phase, name, timed, timed_vectors, p.queries.k)
            seconds[name] += answers[name].seconds
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        figures: dict[str, Any] = dict((known or {}).get(name, {}))
        if judged and set(figures.get("per_query", ())) != {q.query_id for q in judged}:
            deep = _ask(phase, name, judged, judged_vectors, JUDGED_DEPTH)
            relevance = evaluate.relevance(deep.keys, {q.query_id: judgements[q.query_id] for q in judged})
            figures = {m: round(relevance.measures[m], 4) for m in MEASURES} | {"per_query": relevance.per_query}
        times = {key: round(v, 3) for key, v in evaluate.latency(seconds[name]).items() if key.endswith("_ms")}
        result[name] = {**figures, **times, "judged": len(judged), "timed": len(timed), "answers": answers[name].keys}
    return result


def show(result: dict[str, dict[str, Any]]) -> Table:
    """One row a system, without what stands for single queries."""
    return Table.of({"system": name, **figures} for name, figures in _totals(result).items())


def _totals(result: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures without those of single queries."""
    single = ("answers", "per_query")
    return {name: {k: v for k, v in figures.items() if k not in single} for name, figures in result.items()}


def baseline(phase: Phase) -> Table:
    """Phase 10: measures the legacy search and keeps its figures and its answers to the timed queries."""
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [("measure the legacy search",)])
    result = measure(phase, ["legacy"])
    legacy = result["legacy"]
    single = {"answers": legacy["answers"], "per_query": legacy.get("per_query", {})}
    phase.note("baseline", {"systems": _totals(result), **single})
    return show(result)


def verify_baseline(phase: Phase) -> Gates:
    """The legacy search was measured, and the new function answers what it answers."""
    return collect([_baseline_is_recorded(phase), _function_answers_as_legacy(phase)])


def _baseline_is_recorded(phase: Phase) -> Gate:
    recorded = phase.ledger.latest("baseline")
    answered = sum(bool(keys) for keys in recorded["answers"].values()) if recorded else 0
    figures = recorded["systems"]["legacy"] if recorded else {}
    return gate(
        "compare.baseline_is_recorded",
        recorded is not None and answered > 0,
        "the legacy query",
        found=f"{answered} of {figures['timed']} queries have an answer, p50 {figures['p50_ms']} ms,"
        f" p95 {figures['p95_ms']} ms" + (f", nDCG@10 {figures['nDCG@10']}" if figures["judged"] else ", not judged")
        if recorded
        else "nothing",
        needed="figures, and an answer to at least one query",
        danger="without a baseline nobody can say whether the new search is better",
        do="look at legacy.query and at queries.file: they must fit each other",
        figures=figures,
    )


def _function_answers_as_legacy(phase: Phase) -> Gate:
    """Calls the function and runs the legacy query for the timed queries, and compares key by key."""
    p = phase.params
    queries = evaluate.sample(evaluate.read_queries(p), p.queries.sample)
    route, share = search.current_route(phase)
    own = search.ask(phase.connection, p, search.legacy_statement(p), queries, None, p.queries.k)
    called = search.ask(phase.connection, p, search.call_statement(p), queries, None, p.queries.k)
    differ = [q.query_id for q in queries if own.keys[q.query_id] != called.keys[q.query_id]]
    return gate(
        "compare.function_answers_as_legacy",
        not differ,
        p.function_name,
        found=f"{len(queries) - len(differ)} of {len(queries)} queries answered alike"
        + (f"; not {', '.join(differ[:3])}" if differ else "")
        + (f"; route {route} at {share} %" if route != "legacy" else ""),
        needed="all, key by key",
        danger="the application would see other answers as soon as it calls the function",
        do="give legacy.query an ORDER BY without ties (add the key), and names that its search_path resolves",
        figures={"alike": len(queries) - len(differ), "asked": len(queries)},
    )


def shadow(phase: Phase) -> Table:
    """Phase 80: every system answers the same queries; the figures and the winner go into the ledger."""
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [(f"measure {', '.join(systems(phase))}",)])
    recorded = phase.ledger.latest("baseline") or {"systems": {"legacy": {}}, "per_query": {}}
    kept = {m: recorded["systems"]["legacy"].get(m) for m in MEASURES} | {"per_query": recorded["per_query"]}
    result = measure(phase, systems(phase), {"legacy": kept})
    judged = result["legacy"]["judged"]
    winner = max(result, key=lambda name: result[name]["nDCG@10"]) if judged else None
    short = {
        name: sum(len(keys) < len(result["exact"]["answers"][i]) for i, keys in figures["answers"].items())
        for name, figures in result.items()
        if name in ("vector", "hybrid")
    }
    phase.note(
        "shadow",
        {
            "k": phase.params.queries.k,
            "judged": judged,
            "timed": result["legacy"]["timed"],
            "winner": winner,
            "short": short,
            "paired": _paired(result, phase.params.cut_over.route) if judged else None,
            "systems": _totals(result),
        },
    )
    return show(result)


def _paired(result: dict[str, dict[str, Any]], route: str) -> dict[str, float]:
    """Route against legacy, query by query: mean difference of nDCG@10, its confidence interval and p-value."""
    found = evaluate.paired(result["legacy"]["per_query"], result[route]["per_query"])
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
            _is_fast_enough(recorded, route, "legacy"),
            _is_fast_enough(recorded, "vector", "exact"),
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
    allowed = phase.params.cut_over.largest_relevance_loss
    new, old = recorded["systems"][route].get("nDCG@10"), recorded["systems"]["legacy"].get("nDCG@10")
    if new is None or old is None:
        return gate(
            "compare.relevance_is_kept",
            True if phase.params.cut_over.accept_unjudged else None,
            route,
            found="no judgements" + (", accepted by cut_over.accept_unjudged" if new is None else ""),
            needed="judged queries, or cut_over.accept_unjudged: true",
            danger="nobody knows whether the new answers are better or worse",
            do="judge a hundred queries into queries.judgements, or set cut_over.accept_unjudged: true in the open",
        )
    pair = recorded["paired"]
    return gate(
        "compare.relevance_is_kept",
        new >= old - allowed,
        route,
        found=f"nDCG@10 {new:.3f} on {number(recorded['judged'])} judged queries, legacy {old:.3f} (difference"
        f" {pair['low']:+.3f} to {pair['high']:+.3f}, p = {pair['p_value']:.2g}); best is {recorded['winner']}",
        needed=f"at least {old - allowed:.3f}",
        danger="users find less than they do today",
        do="choose the best route in cut_over.route, or another model",
        figures={"new": new, "legacy": old, "judged": recorded["judged"], **pair},
    )


def _is_fast_enough(recorded: dict[str, Any], name: str, other: str) -> Gate:
    new, old = recorded["systems"][name]["p95_ms"], recorded["systems"][other]["p95_ms"]
    return gate(
        f"compare.{name}_is_not_slower_than_{other}",
        new <= max(old, FAST_ENOUGH_MS),
        name,
        found=f"p95 {new:.2f} ms, {other} {old:.2f} ms",
        needed=f"at most {max(old, FAST_ENOUGH_MS):.2f} ms"
        + (f" (below {FAST_ENOUGH_MS:g} ms the difference is noise)" if old < FAST_ENOUGH_MS else ""),
        danger="users wait longer than today" if other == "legacy" else "the index costs writes and gains nothing",
        do="look at the plan in 70_tune, at shared_buffers, and at the setting that was chosen",
        figures={"p95_ms": new, f"{other}_p95_ms": old},
    )
