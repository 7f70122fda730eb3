"""What a minimum similarity would keep and lose, on judged queries; without one, a vector search always returns
rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runbook_lib.benchmark import comparison, query_set
from runbook_lib.benchmark.loop import Answers
from runbook_lib.core import db
from runbook_lib.core.ledger import Ledger
from runbook_lib.params import Params

# Thresholds to try: these shares of all rows found are less similar.
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
DIGITS = 3


def measured(connection: db.Connection, ledger: Ledger, params: Params) -> list[dict[str, Any]]:
    """What thresholds keep and lose: asks the judged queries through the index again; empty without judgements."""
    (judged, _), marks = comparison.sampled(connection, ledger, params, ledger.latest("baseline"))
    if not judged:
        return []
    vector = comparison.variant(connection, ledger, params, "vector", query_set.with_vectors(params, judged))
    return kept_and_lost(vector.ask(params.queries.k), marks, params.vector.distance)


def kept_and_lost(answers: Answers, marks: Mapping[str, Mapping[str, int]], distance: str) -> list[dict[str, Any]]:
    """For each threshold: the share of right answers that it keeps, the share of other rows that it leaves out, and
    how many queries it leaves without rows. An unjudged row counts as wrong.
    """
    similar = [[similarity(d, distance) for _, d in rows if d is not None] for rows in answers.rows]
    right = [
        marks.get(query.query_id, {}).get(key, 0) > 0
        for query, rows in zip(answers.queries, answers.rows, strict=True)
        for key, d in rows
        if d is not None
    ]
    flat, is_right = np.array([s for of_query in similar for s in of_query]), np.array(right, bool)
    if not flat.size:
        return []
    found = []
    for least in dict.fromkeys(round(float(q), DIGITS) for q in np.quantile(flat, QUANTILES)):
        kept = flat >= least
        found.append(
            {
                "min_similarity": least,
                "right_kept": _share(kept[is_right]),
                "others_left_out": _share(~kept[~is_right]),
                "without_rows": sum(not any(s >= least for s in of_query) for of_query in similar),
                "queries": len(similar),
            }
        )
    return found


def similarity(distance: float, kind: str) -> float:
    """As the search function returns it; see :func:`runbook_lib.search.statements.similarity`."""
    return {"cosine": 1 - distance, "inner_product": -distance, "l2": 1 / (1 + distance)}[kind]


def _share(of: np.ndarray[Any, np.dtype[np.bool_]]) -> float | None:
    return round(float(of.mean()), DIGITS) if of.size else None
