"""How much two searches agree, where nobody has judged their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from runbook_lib.benchmark import relevance_measures

# Weight of each place of the one before it; Webber, Moffat and Zobel, TOIS 2010: the first ten places count 86 %.
PERSISTENCE = 0.9

Answers = Mapping[str, Sequence[str]]


def rank_biased_overlap(a: Sequence[str], b: Sequence[str], k: int) -> float:
    """Overlap of the first 1, 2, … k answers, the first places counting most; 1.0 for equal lists, 0.0 for disjoint.

    The finite sum of Webber, Moffat and Zobel (2010), divided by what equal lists reach at depth k. Where both lists
    end before k, their length is the depth. 1.0 where neither has any answer.
    """
    depth = min(k, max(len(a), len(b)))
    if not depth:
        return 1.0
    weights = [PERSISTENCE**d for d in range(depth)]
    shared = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, depth + 1)]
    return sum(w * s for w, s in zip(weights, shared, strict=True)) / sum(weights)


def rank_correlation(a: Sequence[str], b: Sequence[str], k: int) -> float | None:
    """Kendall's tau over the rows that both answer among their first k; None where they share fewer than two.

    An answer has no ties: the share of pairs in one order less the share of those in another (Kendall, 1938).
    """
    places = {key: i for i, key in enumerate(b[:k])}
    shared = [places[key] for key in a[:k] if key in places]
    if len(shared) < 2:
        return None
    pairs = [1 if first < second else -1 for first, second in combinations(shared, 2)]
    return sum(pairs) / len(pairs)


def agreement(a: Answers, b: Answers, k: int) -> dict[str, float | None]:
    """Means over the queries of both: ``overlap`` of the first k, ``rbo``, and ``tau`` where it can be had."""
    both = [i for i in a if i in b]
    taus = [tau for i in both if (tau := rank_correlation(a[i], b[i], k)) is not None]
    return {
        "overlap": round(float(np.mean([relevance_measures.overlap(a[i], b[i], k) for i in both])), 4)
        if both
        else None,
        "rbo": round(float(np.mean([rank_biased_overlap(a[i], b[i], k) for i in both])), 4) if both else None,
        "tau": round(float(np.mean(taus)), 4) if taus else None,
    }


def most_different(a: Answers, b: Answers, k: int, n: int) -> list[str]:
    """The ids of the n queries whose answers differ most, by rank-biased overlap."""
    return sorted((i for i in a if i in b), key=lambda i: (rank_biased_overlap(a[i], b[i], k), i))[:n]
