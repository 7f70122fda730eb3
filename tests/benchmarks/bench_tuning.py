"""Phase 70 on WordNet's glosses: the chosen way of each filter class against the best measured and common practice.

pytest -s tests/benchmarks/bench_tuning.py
"""

from collections.abc import Callable

import pytest

from runbook_lib import tune
from runbook_lib.phase import Phase
from tests.benchmarks import dictionaries

# The chosen way may take this much longer than the fastest that reached the target.
WORST_RATIO = 1.1


@dictionaries.needed
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", [0.95, 0.99])
def test_every_class_reaches_the_target_at_the_price_of_the_best_way(
    dictionary: Callable[..., Phase], target: float
) -> None:
    phase = dictionary(tune={"target_recall": target})
    found = tune.apply(phase)
    assert isinstance(found, tune.Tuning)
    print(f"\ntarget {target}\n{found.table()}")
    for choice in found.choices:
        print(f"  {choice.of}: {choice.advice}" if choice.advice else "", end="\n" if choice.advice else "")
        for point in choice.points:
            print(f"    {choice.of} | {point.way} | recall {point.recall:.3f} (worst {point.worst:.3f})"
                  f" p50 {point.p50_ms:.2f} short {point.rows_short} of {point.questions}, {point.plan}")  # fmt: skip
    for choice in found.choices:
        assert choice.chosen is not None and choice.chosen.recall >= target, str(choice.of)
        reached = [p.p50_ms for p in choice.points if p.reaches(target)]
        chosen = next(p for p in choice.points if p.way == choice.chosen.way)
        assert chosen.p50_ms <= WORST_RATIO * min(reached), str(choice.of)
