"""Phase 60 against a bare CREATE INDEX CONCURRENTLY with the same settings, in turn, in one run.

pytest -s tests/benchmarks/bench_index.py
"""

import time
from collections.abc import Callable

import numpy as np
import pytest

from runbook_lib.core import db
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import build_index
from tests.benchmarks import dictionaries

ROUNDS = 3
# Progress is looked at and the ledger written while it builds; that may cost so much.
WORST_RATIO = 1.05


def bare(phase: Phase) -> float:
    """Seconds of the statement alone, on a connection with the settings of the parameters."""
    i = phase.params.index
    with db.connect(phase.params, "benchmark") as connection:
        connection.execute("SET lock_timeout = 0")
        connection.execute("SELECT set_config('maintenance_work_mem', %s, false)", [f"{i.maintenance_work_mem_mb}MB"])
        connection.execute(
            "SELECT set_config('max_parallel_maintenance_workers', %s, false)", [str(i.parallel_workers)]
        )
        started = time.perf_counter()
        connection.execute(
            "CREATE INDEX CONCURRENTLY glosses_embedding_hnsw ON glosses USING hnsw (embedding vector_cosine_ops)"
            f" WITH (m = {i.m}, ef_construction = {i.ef_construction})"  # type: ignore[arg-type]
        )
        return time.perf_counter() - started


def by_phase_60(phase: Phase) -> float:
    """Seconds of the phase's own work."""
    started = time.perf_counter()
    build_index.apply(phase)
    return time.perf_counter() - started


@dictionaries.needed
@pytest.mark.timeout(3600)
def test_the_build_costs_no_more_than_its_statement(dictionary: Callable[..., Phase]) -> None:
    phase = dictionary()
    seconds: dict[str, list[float]] = {"bare": [], "phase 60": []}
    for _ in range(ROUNDS):
        for name, build in (("bare", bare), ("phase 60", by_phase_60)):
            build_index.undo(phase)
            seconds[name].append(build(phase))
    assert build_index.verify(phase).passed
    alone, ours = (float(np.median(seconds[name])) for name in ("bare", "phase 60"))
    print(f"\nbare {seconds['bare']}, phase 60 {seconds['phase 60']}: medians {alone:.1f} and {ours:.1f} s,"
          f" {ours / alone:.3f} times")  # fmt: skip
    assert ours <= alone * WORST_RATIO
