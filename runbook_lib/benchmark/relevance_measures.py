"""The measures that say whether one search is better than another, by judgements or by what both answer; latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import ir_measures
import numpy as np
from numpy.typing import NDArray

MEASURES = ("nDCG@10", "RR", "R@10", "R@100", "P@10")
# The measure that routes are judged by, kept for each query so that two searches can be compared pair by pair.
PAIRED_MEASURE = "nDCG@10"

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 500
CONFIDENCE = 0.95
# Weight of each place of the one before it; Webber, Moffat and Zobel, TOIS 2010: the first ten places count 86 %.
PERSISTENCE = 0.9

Answers = Mapping[str, Sequence[str]]
# So seldom may a p50 or a p95 be called too slow where it is not.
QUANTILE_DOUBT = 0.01
SEED = 20260225
SEPARATOR = "\x1f"


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

    def as_data(self) -> dict[str, float]:
        """For the ledger."""
        return {name: round(value, 5) for name, value in vars(self).items()}


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
        "overlap": round(float(np.mean([overlap(a[i], b[i], k) for i in both])), 4) if both else None,
        "rbo": round(float(np.mean([rank_biased_overlap(a[i], b[i], k) for i in both])), 4) if both else None,
        "tau": round(float(np.mean(taus)), 4) if taus else None,
    }


def most_different(a: Answers, b: Answers, k: int, n: int) -> list[str]:
    """The ids of the n queries whose answers differ most, by rank-biased overlap."""
    return sorted((i for i in a if i in b), key=lambda i: (rank_biased_overlap(a[i], b[i], k), i))[:n]


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """p50_ms, p95_ms and p99_ms, interpolated linearly, p95_at_least_ms by :func:`p95_at_least` (or 0),
    and n. Raises ValueError where nothing was timed.
    """
    if not len(seconds):
        raise ValueError("no query was timed")
    p50, p95, p99 = map(float, np.percentile(np.asarray(seconds) * 1000, [50, 95, 99]))
    sure = p95_at_least(seconds) or 0.0
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "p95_at_least_ms": sure, "n": len(seconds)}


def p50_at_least(seconds: Sequence[float]) -> float | None:
    """Milliseconds that the median exceeds with 99 % confidence; None for fewer than seven times."""
    return _quantile_at_least(seconds, 0.50)


def p95_at_least(seconds: Sequence[float]) -> float | None:
    """Milliseconds that the 95th percentile exceeds with 99 % confidence; None for fewer than two times."""
    return _quantile_at_least(seconds, 0.95)


def _quantile_at_least(seconds: Sequence[float], quantile: float) -> float | None:
    """Its lower bound in ms, however the times are distributed.

    The r-th of n times in order is that bound where at most r - 1 of n times would lie below the quantile with a
    probability of 1 % or less (Conover, Practical Nonparametric Statistics, on quantiles).
    """
    n, rank, chance = len(seconds), 0, 0.0
    while rank < n:
        ways = math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1)
        chance += math.exp(ways + rank * math.log(quantile) + (n - rank) * math.log(1 - quantile))
        if chance > QUANTILE_DOUBT:
            break
        rank += 1
    return sorted(seconds)[rank - 1] * 1000 if rank else None
