"""Phase 80: every search answers the same queries side by side, and the one that is to serve is judged."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from runbook_lib.benchmark import comparison, explain, loop, plan_diagnosis, query_set, relevance_measures
from runbook_lib.benchmark.prepared import reads_index
from runbook_lib.core import db
from runbook_lib.core.display import Table, number
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart, at_least, at_most, milliseconds, score
from runbook_lib.migrate import similarity_thresholds, slices
from runbook_lib.params import Params
from runbook_lib.search import statements

if TYPE_CHECKING:
    import pandas

# Queries on the sheet that a person judges.
SHEET_QUERIES = 10
SHOWN_LETTERS = 80


@dataclass(frozen=True)
class Comparison:
    """What phase 80 shows: every search, the classes of queries, similarity thresholds, and the sheet."""

    tables: tuple[Table, ...]

    def to_frame(self) -> pandas.DataFrame:
        """One row per search, with its figures; for single queries: :func:`comparison.per_query`."""
        return self.tables[0].to_frame()

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))


@changes
def apply(phase: Phase) -> Comparison | Table:
    """Every system answers the same queries; the figures and the winner go into the ledger."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [(f"measure {', '.join(comparison.systems(phase))}",)])
    k, route = params.queries.k, params.cut_over.route
    recorded = ledger.latest("baseline") or {"systems": {"legacy": {}}, "per_query": {}}
    kept = {m: value for m, value in recorded["systems"]["legacy"].items() if m in comparison.MEASURES}
    kept |= {key: recorded.get(key, {}) for key in comparison.SINGLE if key != "answers"}
    result = comparison.measure(connection, ledger, params, comparison.systems(phase), {"legacy": kept})
    judged = result["legacy"]["judged"]
    winner = max(result, key=lambda name: result[name]["nDCG@10"]) if judged else None
    short = {
        name: sum(len(keys) < len(result["exact"]["answers"][i]) for i, keys in figures["answers"].items())
        for name, figures in result.items()
        if name in ("vector", "hybrid")
    }
    answers = {name: figures["answers"] for name, figures in result.items()}
    found = _slices(connection, params, result) if judged else []
    thresholds = similarity_thresholds.measured(connection, ledger, params) if judged else []
    reads_index = _reads_the_index(connection, ledger, params)
    agreed = {
        name: relevance_measures.agreement(answers["legacy"], answers[name], k) for name in result if name != "legacy"
    }
    phase.note(
        "shadow",
        {
            "k": k,
            "judged": judged,
            "timed": result["legacy"]["timed"],
            "winner": winner,
            "short": short,
            "vector_reads_the_index": reads_index,
            "vector_cause": None if reads_index else asdict(explain.cause_in_the_function(connection, params)),
            "paired": _paired(result, route) if judged else None,
            "pairs": {name: _paired(result, name) for name in agreed} if judged else {},
            "slices": found,
            "thresholds": thresholds,
            "agreement_with_legacy": agreed,
            "systems": comparison.totals(result),
            "answers": {route: answers[route]},
            "per_query": {route: result[route].get("per_query", {})},
            "moved": comparison.moved(result["legacy"], result[route]),
        },
    )
    agreed_table = Table.of(({"system": n, **a} for n, a in agreed.items()), "answers in common with legacy")
    slices_table = Table.of(found, f"legacy against {route}, by class of query (nDCG@10)")
    sheet_of = sheet(connection, ledger, params, answers["legacy"], answers[route])
    least = Table.of(thresholds, "vector: what search.smallest_similarity would keep and lose, on judged queries")
    more = [*([slices_table] if found else []), *([least] if thresholds else [])]
    return Comparison((comparison.show(result), agreed_table, *more, sheet_of))


def _reads_the_index(connection: db.Connection, ledger: Ledger, params: Params) -> bool:
    """Does the vector search read the index here, as it was asked and timed?"""
    queries = query_set.sample(query_set.read_queries(params), params.queries.sample)[:1]
    vector = comparison.variant(connection, ledger, params, "vector", query_set.with_vectors(params, queries))
    with vector.connected() as reader:
        statement = statements.route_statement(connection, params, "vector")
        return reads_index(reader, params, loop.planned(reader, params, statement, vector.queries[0]))


def _slices(connection: db.Connection, params: Params, result: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The judged queries by class, legacy against the route."""
    legacy, route = result["legacy"], params.cut_over.route
    queries = [q for q in query_set.read_queries(params) if q.query_id in legacy["per_query"]]
    groups = slices.classes(connection, params, queries, set(legacy["unanswered"]))
    scores = {name: result[name]["per_query"] for name in result}
    return slices.compare(groups, scores, route)


def sheet(
    connection: db.Connection,
    ledger: Ledger,
    params: Params,
    old: relevance_measures.Answers,
    new: relevance_measures.Answers,
) -> Table:
    """The queries whose answers differ most, for a person to judge with :func:`judge`: a row an answer."""
    k = params.queries.k
    texts = {q.query_id: q.text for q in query_set.read_queries(params)}
    ids = relevance_measures.most_different(old, new, k, SHEET_QUERIES)
    keys = sorted({key for i in ids for key in (*old[i][:3], *new[i][:3])})
    found = db.rows(connection, comparison.SQL["first_words"], params, keys=keys)
    begin = {r["key"]: " ".join(r["text"].split())[:SHOWN_LETTERS] for r in found}
    marks = comparison.judgements(connection, ledger, params)
    rows = [
        (i, texts[i], side, place, key, begin.get(key, ""), marks.get(i, {}).get(key))
        for i in ids
        for side, answers in (("legacy", old), (params.cut_over.route, new))
        for place, key in enumerate(answers[i][:3], 1)
    ]
    columns = ("query_id", "query", "answered by", "place", "key", "row", "relevance")
    return Table(
        columns, rows, "the most different answers; comparison.judge(phase, query_id, key, relevance) marks one"
    )


def _paired(result: dict[str, dict[str, Any]], route: str) -> dict[str, float]:
    """Route against legacy, query by query: mean difference of nDCG@10, its confidence interval and p-value."""
    return relevance_measures.paired(result["legacy"]["per_query"], result[route]["per_query"]).as_data()


def verify(phase: Phase) -> Gates:
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
            _relevance_is_kept(phase.params, recorded, route),
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


def _relevance_is_kept(params: Params, recorded: dict[str, Any], route: str) -> Gate:
    allowed, unjudged = params.cut_over.largest_relevance_loss, params.cut_over.accept_unjudged
    new, old = recorded["systems"][route].get("nDCG@10"), recorded["systems"]["legacy"].get("nDCG@10")
    if new is None or old is None:
        return gate(
            "compare.relevance_is_kept",
            True if unjudged else None,
            route,
            found="no judgements" + (", accepted by cut_over.accept_unjudged" if unjudged else ""),
            needed="judged queries, or cut_over.accept_unjudged: true",
            danger="it is not known whether the new answers are better or worse",
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


def _is_fast_enough(recorded: dict[str, Any], route: str, slowdown: float) -> Gate:
    """Against legacy, by the slowdown that was accepted."""
    systems, legacy_ms = recorded["systems"], recorded["systems"]["legacy"]["p95_ms"]
    limit = comparison.limit_ms(legacy_ms, slowdown)
    others = [
        f"{name} would pass (p95 {systems[name]['p95_ms']:.2f} ms{_scored(recorded, name)})"
        for name in ("vector", "hybrid")
        if name != route and name in systems and at_most(systems[name]["p95_ms"], limit)
    ]
    enough = systems[route]["p95_ms"] / legacy_ms if legacy_ms else 0.0
    accept = f"accept it by cut_over.largest_slowdown: {enough + 0.05:.1f}, if its answers are worth the wait"
    return comparison.is_fast_enough(
        f"compare.{route}_is_not_slower_than_legacy",
        route,
        systems[route],
        legacy_ms,
        lambda p95: f"{p95}{_scored(recorded, route)}, legacy {legacy_ms:.2f} ms" + _scored(recorded, "legacy"),
        "; or ".join([*(f"cut_over.route: {o}" for o in others), accept, "look at the plan in 70_tune"]),
        slowdown,
        f", {slowdown:g} × legacy (cut_over.largest_slowdown)",
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
    shown, most = apart(new, max(exact, comparison.FAST_ENOUGH_MS), milliseconds)
    return gate(
        "compare.vector_is_not_slower_than_exact",
        alike or at_most(new, max(exact, comparison.FAST_ENOUGH_MS)),
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
        + (
            f" (below {comparison.FAST_ENOUGH_MS:g} ms the difference is noise)"
            if exact < comparison.FAST_ENOUGH_MS
            else ""
        ),
        danger="the index costs writes and gains nothing",
        do=cause.get("do") or "look at the plan in 70_tune, at shared_buffers, and at the setting that was chosen",
        figures={"p50_ms": new, "exact_p50_ms": exact},
    )
