"""Recall: the share of the exact answers that a search found. Every figure of recall in this project comes from here.

A row as near as an exact answer is as right as that: which of several rows at one distance a search gives is chance,
and no loss. It takes the place of one exact answer at that distance or farther, never of a nearer one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

# Keys as text, with their distances, nearest first; a distance that is not known is None.
Rows = Sequence[tuple[str, float | None]]

# Distances as near as this, for vectors at length 1, are the same: single precision does not tell them apart.
SAME_DISTANCE = 1e-5
RESAMPLES, CONFIDENCE, SEED = 2_000, 0.95, 20260225
# The normal distribution's quantile for that confidence, both sides.
Z = 1.959964


@dataclass(frozen=True)
class Nearest:
    """The k nearest rows of one question: keys as text, nearest first, and their distances.

    matching: rows with a vector that the question's filters let through. same: how far apart two distances may be
    and count as one. reserve: keys of the next nearest, which move up where one of the k is deleted. A row without a
    distance (a zero vector under cosine) is near nothing, and in no answer.
    """

    keys: tuple[str, ...]
    distances: tuple[float, ...]
    matching: int
    same: float = SAME_DISTANCE
    reserve: tuple[str, ...] = field(default=(), compare=False)


def of_rows(rows: Rows, distance: str) -> Nearest:
    """What exact SQL answered. distance: the kind, as the parameters have it."""
    known = [(key, d) for key, d in rows if d is not None and math.isfinite(d)]
    farthest = max((abs(d) for _, d in known), default=0.0)
    # Both sides are of the server, which sums in one order: only the last digits differ, by how large they are.
    same = SAME_DISTANCE * (1.0 if distance == "cosine" else farthest)
    return Nearest(tuple(key for key, _ in known), tuple(d for _, d in known), len(known), same)


def share(exact: Nearest, got: Rows, own_key: str | None = None) -> float:
    """recall@k of one question: the share of the exact answers that were got, 0 to 1; order does not count.

    got: at most k rows; a key that comes twice counts once. own_key: the row that the question was made from, which
    every search finds and which counts on neither side. NaN where nothing was to be found.
    """
    answers: dict[str, float | None] = {}
    for key, distance in got:
        answers.setdefault(key, distance)
    places = dict(zip(exact.keys, exact.distances, strict=True))
    if own_key is not None and own_key in answers:
        own = answers.pop(own_key)
        if own_key not in places and own is not None and places and own <= exact.distances[-1] + exact.same:
            # As near as the last exact answer, it took the place of that.
            places.pop(exact.keys[-1])
    if own_key is not None:
        places.pop(own_key, None)
    if not places:
        return math.nan
    left = sorted(d for key, d in places.items() if key not in answers)
    others = sorted(d for key, d in answers.items() if key not in places and d is not None and not math.isnan(d))
    filled = 0
    for distance in left:
        if filled < len(others) and others[filled] <= distance + exact.same:
            filled += 1
    return (len(places) - len(left) + filled) / len(places)


@dataclass(frozen=True)
class Recall:
    """recall@k of many questions.

    mean: over the questions that have an answer to be found. low, high: its 95 % confidence interval. worst: the mean
    of the group of questions that is served worst. returned: rows returned of those that there are. short: questions
    with fewer rows than there are. answers: exact answers of all questions.
    """

    mean: float
    low: float
    high: float
    worst: float
    returned: float
    short: int
    answers: int

    @property
    def of_the_target(self) -> float:
        """The mean for a whole target, which is never perfect by emptiness: 0.0 where there is no answer at all."""
        return self.mean if self.answers else 0.0


def of(
    exact: Sequence[Nearest],
    got: Sequence[Rows],
    own_keys: Sequence[str | None] = (),
    groups: Sequence[Hashable] = (),
) -> Recall:
    """recall@k of the same questions in the same order: exact answers, and what was got.

    own_keys: as for :func:`share`, one a question. groups: what each question was filtered by. Raises ValueError on
    different lengths.
    """
    shares = [share(e, g, own) for e, g, own in zip(exact, got, own_keys or [None] * len(exact), strict=True)]
    by_group: dict[Hashable, list[float]] = {}
    for found, group in zip(shares, groups or [None] * len(exact), strict=True):
        by_group.setdefault(group, []).append(found)
    wanted = sum(len(e.keys) for e in exact)
    returned = [len({key for key, _ in g}) for g in got]
    low, high = interval(shares, wanted)
    return Recall(
        mean=mean(shares),
        low=low,
        high=high,
        worst=min(map(mean, by_group.values()), default=1.0),
        returned=sum(returned) / wanted if wanted else 1.0,
        short=sum(n < len(e.keys) for n, e in zip(returned, exact, strict=True)),
        answers=wanted,
    )


def mean(shares: Sequence[float]) -> float:
    """Mean over the questions that have an answer to be found; 1.0 for a filter value of which none was missed, since
    it has none.
    """
    known = [s for s in shares if not math.isnan(s)]
    return float(np.mean(known)) if known else 1.0


def interval(shares: Sequence[float], answers: int) -> tuple[float, float]:
    """The 95 % confidence interval of mean recall.

    The wider end of two: a percentile bootstrap over the queries, which knows that a query's answers are missed
    together, and Wilson's score interval over the answers, which does not turn to certainty where none was missed
    (Wilson, JASA 22, 1927).
    """
    known = np.array([s for s in shares if not math.isnan(s)])
    if not len(known):
        return 0.0, 1.0
    middle = float(known.mean())
    drawn = known[np.random.default_rng(SEED).integers(0, len(known), (RESAMPLES, len(known)))].mean(axis=1)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    n = max(answers, 1)
    centre = (middle + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(middle * (1 - middle) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return min(float(low), centre - half), max(float(high), min(1.0, centre + half))
