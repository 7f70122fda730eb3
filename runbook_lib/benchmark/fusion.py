"""How to weight words against vectors in hybrid: learned on one half of the judged queries, proved on the other. Both
scores are queried once; every weight is then tried on them without the database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runbook_lib.benchmark import loop, query_set, relevance_measures
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.names import key_of
from runbook_lib.params import Params
from runbook_lib.search import statements
from runbook_lib.search.hybrid import EQUAL_WEIGHT

# Weights of the vectors; the words have the rest.
WEIGHTS = tuple(step / 10 for step in range(11))
# With fewer queries in each half, chance would choose the weight.
FEWEST_QUERIES = 20
MEASURE = relevance_measures.PAIRED_MEASURE
NAMES = {"words": 0.0, "equal": EQUAL_WEIGHT, "vectors": 1.0}

Scores = Mapping[str, Sequence[tuple[str, float, float]]]


@dataclass(frozen=True)
class Fusion:
    """Hybrid's weights. vector_weight: of the vectors; kept: is it used, or are both equal? learned_on, proved_on:
    numbers of queries. proved: nDCG@10 on the queries not used for learning: of words alone, of equal weights, of
    vectors alone, and of the learned weight.
    """

    vector_weight: float
    kept: bool
    learned_on: int
    proved_on: int
    proved: dict[str, float]

    def as_data(self) -> dict[str, Any]:
        """For the ledger."""
        return asdict(self)


def learn(
    connection: db.Connection, params: Params, queries: Sequence[Query], marks: Mapping[str, Mapping[str, int]]
) -> Fusion | None:
    """The weight that is best on one half of these judged queries; kept if it is no worse than equal weights on the
    other half. None if there are too few queries. marks: relevance by query id and key, of these queries at least.
    """
    dealt = query_set.sample(queries, len(queries))
    halves = dealt[::2], dealt[1::2]
    if min(map(len, halves)) < FEWEST_QUERIES:
        return None
    scores = _scores(connection, params, dealt)
    learned_on, proved_on = ({q.query_id: marks[q.query_id] for q in half} for half in halves)
    # Of equally good weights, the one nearest to equal.
    best = max(WEIGHTS, key=lambda w: (round(measure(scores, learned_on, w), 6), -abs(w - EQUAL_WEIGHT)))
    proved = {name: round(measure(scores, proved_on, w), 4) for name, w in (*NAMES.items(), ("learned", best))}
    return Fusion(best, proved["learned"] >= proved["equal"], len(learned_on), len(proved_on), proved)


def measure(scores: Scores, marks: Mapping[str, Mapping[str, int]], vector_weight: float) -> float:
    """nDCG@10 over these queries with this weight of the vectors."""
    ranked = {query_id: ranking(scores.get(query_id, ()), vector_weight) for query_id in marks}
    return relevance_measures.relevance(ranked, marks, (MEASURE,)).measures[MEASURE]


def ranking(scored: Sequence[tuple[str, float, float]], vector_weight: float) -> list[str]:
    """Keys, best first, of rows with the scores of both halves."""
    return [
        key for key, _, _ in sorted(scored, key=lambda row: -(vector_weight * row[1] + (1 - vector_weight) * row[2]))
    ]


def _scores(connection: db.Connection, params: Params, queries: Sequence[Query]) -> dict[str, list[Any]]:
    """Every row that either half finds, by query id: key, score of the vectors, score of the words."""
    statement = loop.by_filters(lambda given: statements.scored_statement(connection, params, given))
    loop.know_vectors(connection, queries)
    found = {}
    for query in queries:
        bound = loop.values(params, query, params.queries.k)
        rows = connection.execute(statement(query), bound, prepare=False).fetchall()
        found[query.query_id] = sorted((key_of(params).text_in(row), row["near"], row["wordy"]) for row in rows)
    return found
