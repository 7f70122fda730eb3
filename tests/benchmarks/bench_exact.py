"""Exact answers to a thousand queries over WordNet's glosses: streamed once, against SQL query by query.

pytest -s tests/benchmarks/bench_exact.py
"""

import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from runbook_lib.benchmark import exact
from runbook_lib.benchmark.query_set import Query, exact_of
from runbook_lib.core import db
from runbook_lib.core.phase import Phase
from runbook_lib.embeddings import embedding
from tests.benchmarks import dictionaries

QUERIES, K, BY_SQL = 1000, 10, 10
LEAST_TIMES_FASTER = 10
MOST_MEGABYTES = 400


@dictionaries.needed
@pytest.mark.timeout(1800)
def test_the_stream_is_faster_than_sql_and_bounded_in_memory(dictionary: Callable[..., Phase]) -> None:
    phase = dictionary()
    vectors = np.asarray(embedding.model(phase.params)(dictionaries.definitions(QUERIES)), np.float32)
    questions = [Query(str(i), "", vector) for i, vector in enumerate(vectors)]
    with db.connect(phase.params, "benchmark") as connection:
        streamed = []
        for _ in range(3):
            started = time.perf_counter()
            answered = exact.answered(connection, phase.params, questions, K)
            streamed.append(time.perf_counter() - started)
        agrees = exact.stream_agrees_with_sql(connection, phase.params, answered, K)
        started = time.perf_counter()
        for i in range(BY_SQL):
            exact.by_sql(connection, phase.params, questions[i], K)
        by_sql = (time.perf_counter() - started) / BY_SQL * len(vectors)
        tracemalloc.start()
        exact.nearest(connection, phase.params, questions, K)
        peak = tracemalloc.get_traced_memory()[1] / 1024 / 1024
        tracemalloc.stop()
    print(
        f"\n{len(vectors)} queries over {exact_of(answered)[0].matching:,} rows: streamed {min(streamed):.2f} s,"
        f" SQL {by_sql:.0f} s ({by_sql / min(streamed):.0f} times), at most {peak:.0f} MB"
    )
    assert agrees.verdict == "PASS"
    assert by_sql > LEAST_TIMES_FASTER * min(streamed)
    assert peak < MOST_MEGABYTES
