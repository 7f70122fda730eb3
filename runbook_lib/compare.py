"""Phases 10 and 80: the legacy search and the new ones side by side, on the same queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from psycopg import sql

from runbook_lib import db, search, tune
from runbook_lib.display import Table, number
from runbook_lib.gates import Gate, Gates, collect, gate
from runbook_lib.measuring import agreement, evaluate, replica, slices
from runbook_lib.measuring.evaluate import Query
from runbook_lib.names import identifier, names
from runbook_lib.phase import Phase
from runbook_lib.sql import load
from runbook_lib.vectors import embed

SQL = load("compare")

# Depth of the answers that are judged: R@100 needs as many.
JUDGED_DEPTH = 100
# Each system answers the timed queries this often, in turn, so that a slow moment hits all of them.
ROUNDS = 3
# Below this p95 a difference is noise, and no user notices it.
FAST_ENOUGH_MS = 5.0
MEASURES = ("nDCG@10", "RR", "R@10", "R@100", "P@10")
# Queries on the sheet that a person judges.
SHEET_QUERIES = 10
WITHOUT_VECTORS = ("legacy", "fulltext")


def systems(phase: Phase) -> list[str]:
    """What is compared in phase 80; full text alone and hybrid only where there is a full-text column."""
    if not phase.params.search.fulltext_column:
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


def _ask(phase: Phase, system: str, queries: Sequence[Query], vectors: np.ndarray | None, k: int) -> search.Answers:
    p = phase.params
    if system == "fulltext":
        statement = _fulltext_statement(phase)
    else:
        exact = system == "exact"
        route = "vector" if exact else system
        statement = search.route_statement(phase.connection, p, route, scan="exact" if exact else "index")  # type: ignore[arg-type]
    asked = None if system in WITHOUT_VECTORS else vectors

    def ask() -> search.Answers:
        with _connected(phase, system) as connection:
            return search.ask(connection, p, statement, queries, asked, k)

    return replica.again(p, ask)


def _fulltext_statement(phase: Phase) -> sql.Composed:
    s = phase.params.search
    return SQL["fulltext"].compose(
        names(phase.params)
        | {
            "fulltext": identifier(s.fulltext_column or ""),
            "fulltext_config": sql.SQL("{}::regconfig").format(sql.Literal(s.fulltext_config)),
        }
    )


def judge(phase: Phase, query_id: str, key: str, relevance: int) -> None:
    """Keeps a person's mark in the ledger: 0 for wrong, higher for better; given again, the newer one counts.

    Raises ValueError for a query that the query file does not have, or a negative mark.
    """
    if query_id not in {q.query_id for q in evaluate.read_queries(phase.params)} or relevance < 0:
        raise ValueError(f"query {query_id} with relevance {relevance}: needed a query of the file and a mark from 0")
    phase.ledger.append("judgement", {"query_id": query_id, "key": str(key), "relevance": relevance})


def judgements(phase: Phase) -> dict[str, dict[str, int]]:
    """Relevance by query id and key: those of the file, and over them the marks given in the notebook."""
    found = {query_id: dict(keys) for query_id, keys in evaluate.read_judgements(phase.params).items()}
    known = {q.query_id for q in evaluate.read_queries(phase.params)}
    for row in db.rows(phase.connection, SQL["judgements"], phase.params) if phase.ledger.exists() else []:
        if row["query_id"] in known:
            found.setdefault(row["query_id"], {})[row["key"]] = row["relevance"]
    return found


def measure(
    phase: Phase, systems: Sequence[str], known: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Relevance on the judged queries and latency on the timed ones, by system.

    known: relevance that was measured before and is not measured again. Returns, by system: the measures, p50_ms,
    p95_ms, p99_ms, judged and timed (numbers of queries), per_query (nDCG@10) and answers (keys of the timed
    queries), both by query id, and unanswered (ids of judged queries without any answer).
    """
    p = phase.params
    queries, marks = evaluate.read_queries(p), judgements(phase)
    judged = evaluate.sample([q for q in queries if q.query_id in marks], p.queries.judged_sample)
    timed = evaluate.sample(queries, p.queries.sample)
    vectors_are_asked = set(systems) != {"legacy"}
    judged_vectors = embed.query_vectors(p, judged) if vectors_are_asked and judged else None
    timed_vectors = embed.query_vectors(p, timed) if vectors_are_asked else None
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    answers: dict[str, search.Answers] = {}
    for _ in range(ROUNDS):
        for name in systems:
            answers[name] = _ask(phase, name, timed, timed_vectors, p.queries.k)
            seconds[name] += answers[name].seconds
    result: dict[str, dict[str, Any]] = {}
    for name in systems:
        figures: dict[str, Any] = dict((known or {}).get(name, {}))
        if judged and set(figures.get("per_query", ())) != {q.query_id for q in judged}:
            deep = _ask(phase, name, judged, judged_vectors, JUDGED_DEPTH)
            relevance = evaluate.relevance(deep.keys, {q.query_id: marks[q.query_id] for q in judged})
            figures = {m: round(relevance.measures[m], 4) for m in MEASURES} | {
                "per_query": relevance.per_query,
                "unanswered": [i for i, keys in deep.keys.items() if not keys],
            }
        times = {key: round(v, 3) for key, v in evaluate.latency(seconds[name]).items() if key.endswith("_ms")}
        result[name] = {**figures, **times, "judged": len(judged), "timed": len(timed), "answers": answers[name].keys}
    return result


def show(result: dict[str, dict[str, Any]]) -> Table:
    """One row a system, without what stands for single queries."""
    return Table.of({"system": name, **figures} for name, figures in _totals(result).items())


def _totals(result: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures without those of single queries."""
    single = ("answers", "per_query", "unanswered")
    return {name: {k: v for k, v in figures.items() if k not in single} for name, figures in result.items()}


def baseline(phase: Phase) -> Table:
    """Phase 10: measures the legacy search and keeps its figures and its answers to the timed queries."""
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [("measure the legacy search",)])
    result = measure(phase, ["legacy"])
    legacy = result["legacy"]
    single = {key: legacy.get(key, {}) for key in ("answers", "per_query", "unanswered")}
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


def shadow(phase: Phase) -> Comparison | Table:
    """Phase 80: every system answers the same queries; the figures and the winner go into the ledger."""
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [(f"measure {', '.join(systems(phase))}",)])
    k, route = phase.params.queries.k, phase.params.cut_over.route
    recorded = phase.ledger.latest("baseline") or {"systems": {"legacy": {}}, "per_query": {}}
    kept = {m: value for m, value in recorded["systems"]["legacy"].items() if m in MEASURES}
    kept |= {key: recorded.get(key, {}) for key in ("per_query", "unanswered")}
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
    agreed = {name: agreement.agreement(answers["legacy"], answers[name], k) for name in result if name != "legacy"}
    phase.note(
        "shadow",
        {
            "k": k,
            "judged": judged,
            "timed": result["legacy"]["timed"],
            "winner": winner,
            "short": short,
            "paired": _paired(result, route) if judged else None,
            "pairs": {name: _paired(result, name) for name in agreed} if judged else {},
            "slices": found,
            "agreement_with_legacy": agreed,
            "systems": _totals(result),
            "answers": {route: answers[route]},
            "per_query": {route: result[route].get("per_query", {})},
        },
    )
    agreed_table = Table.of(({"system": n, **a} for n, a in agreed.items()), "answers in common with legacy")
    slices_table = Table.of(found, f"legacy against {route}, by class of query (nDCG@10)")
    sheet_of = sheet(phase, answers["legacy"], answers[route])
    return Comparison((show(result), agreed_table, *([slices_table] if found else []), sheet_of))


def _slices(phase: Phase, result: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The judged queries by class, legacy against the route."""
    legacy, route = result["legacy"], phase.params.cut_over.route
    queries = [q for q in evaluate.read_queries(phase.params) if q.query_id in legacy["per_query"]]
    groups = slices.classes(phase, queries, set(legacy["unanswered"]))
    scores = {name: result[name]["per_query"] for name in result}
    return slices.compare(groups, scores, route)


def sheet(phase: Phase, old: agreement.Answers, new: agreement.Answers) -> Table:
    """The queries whose answers differ most, for a person to judge with :func:`judge`: a row an answer."""
    k = phase.params.queries.k
    texts = {q.query_id: q.text for q in evaluate.read_queries(phase.params)}
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
        columns, rows, "the most different answers; compare.judge(phase, query_id, key, relevance) marks one"
    )


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
            _is_fast_enough(recorded, route, "legacy", "p95"),
            _is_fast_enough(recorded, "vector", "exact", "p50"),
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
    pair, losing = recorded["paired"], slices.where_legacy_wins(recorded["slices"])
    return gate(
        "compare.relevance_is_kept",
        new >= old - allowed,
        route,
        found=f"nDCG@10 {new:.3f} on {number(recorded['judged'])} judged queries, legacy {old:.3f} (difference"
        f" {pair['low']:+.3f} to {pair['high']:+.3f}, p = {pair['p_value']:.2g}); best is {recorded['winner']}"
        + (f"; legacy wins on: {', '.join(losing)}" if losing else ""),
        needed=f"at least {old - allowed:.3f}",
        danger="users find less than they do today",
        do="choose the best route in cut_over.route, or another model",
        figures={"new": new, "legacy": old, "judged": recorded["judged"], **pair},
    )


def _is_fast_enough(recorded: dict[str, Any], name: str, other: str, percentile: str) -> Gate:
    """Users feel the slow answers, so against legacy p95 counts; that the index pays shows best in the median."""
    key = f"{percentile}_ms"
    new, old = recorded["systems"][name][key], recorded["systems"][other][key]
    return gate(
        f"compare.{name}_is_not_slower_than_{other}",
        new <= max(old, FAST_ENOUGH_MS),
        name,
        found=f"{percentile} {new:.2f} ms, {other} {old:.2f} ms",
        needed=f"at most {max(old, FAST_ENOUGH_MS):.2f} ms"
        + (f" (below {FAST_ENOUGH_MS:g} ms the difference is noise)" if old < FAST_ENOUGH_MS else ""),
        danger="users wait longer than today" if other == "legacy" else "the index costs writes and gains nothing",
        do="look at the plan in 70_tune, at shared_buffers, and at the setting that was chosen",
        figures={key: new, f"{other}_{key}": old},
    )
