"""A search in both layouts: vectors in the table, and in a table of their own beside it.

    python -m tests.benchmarks.bench_layout [--rows 100000] [--calls 1000]

The same rows, of 1 kB, and the same vectors of 384 dimensions, taken through phases 30 to 60 in either layout, with
HNSW as the parameters have it unless told otherwise. Then the very query that the search function sends, with an
iterative scan, prepared, vectors in binary, call by call in turn. Asserts that every plan reads the vector index.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import yaml
from pgvector.psycopg import register_vector

from runbook_lib.cli import embedded
from runbook_lib.core import db
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.search import statements
from tests.benchmarks import bench_load
from tests.opened import opened_for_a_while

TABLES = {"column": "articles", "side_table": "articles_beside"}
K = 10
EF_SEARCH = 40
# The percentile of the calls that nobody disturbed.
QUIET = 10
CLUSTERS, SPREAD = 200, 0.6


@contextlib.contextmanager
def opened(folder: Path, layout: str) -> Iterator[Phase]:
    """A phase on this layout's own copy of the table."""
    data = yaml.safe_load(bench_load.write_params(folder, "npy").read_text())
    data["target"] |= {"name": TABLES[layout], "table": TABLES[layout]}
    data["vector"]["layout"] = layout
    data["legacy"]["query"] = data["legacy"]["query"].replace("articles", TABLES[layout])
    data["index"] = {"maintenance_work_mem_mb": 1024}
    path = folder / f"{layout}.yaml"
    path.write_text(yaml.safe_dump(data))
    with opened_for_a_while(load_params(path)) as phase:
        yield phase


def write_vectors(folder: Path, rows: int) -> np.ndarray:
    """Vectors around some centres, of length 1: random ones alone have no neighbours to speak of."""
    random = np.random.default_rng(1)
    centres = random.standard_normal((CLUSTERS, bench_load.DIMENSION), dtype=np.float32)
    vectors = centres[random.integers(CLUSTERS, size=rows)]
    vectors += SPREAD * random.standard_normal(vectors.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "ids.npy", np.arange(1, rows + 1))
    return vectors


def prepare(dsn: str, folder: Path, layout: str, rows: int) -> None:
    """Phases 30 to 60 in this layout; what they print is let go."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in bench_load.CREATE.replace("articles", TABLES[layout]).strip().split(";\n"):
            connection.execute(statement.replace("%s", str(rows)))
    with opened(folder, layout) as phase, contextlib.redirect_stdout(io.StringIO()):
        phase.ledger.create()
        extension.apply(phase)
        db.use_search_path(phase.connection)
        for module in (expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"VACUUM ANALYZE {TABLES[layout]}")


def ask(folder: Path, layout: str, vectors: np.ndarray) -> Iterator[float]:
    """Seconds of each search, one a step, on a connection of its own."""
    with opened(folder, layout) as phase, db.connect(phase.params, "bench search") as connection:
        register_vector(connection)
        connection.execute("SELECT set_config('hnsw.ef_search', %s, false)", [str(EF_SEARCH)])
        connection.execute("SET hnsw.iterative_scan = strict_order")
        statement = statements.route_statement(phase.connection, phase.params, "vector")
        values: dict[str, Any] = {"query": "", "k": K}
        plan = connection.execute(
            b"EXPLAIN " + statement.as_bytes(connection), values | {"embedding": vectors[0]}, prepare=False
        )
        assert any("_hnsw" in str(line) for line in plan.fetchall()), "the plan does not read the index"
        for vector in vectors:
            began = time.perf_counter()
            found = connection.execute(
                statement, values | {"embedding": vector}, binary=True, prepare=True
            ).fetchall()
            seconds = time.perf_counter() - began
            assert len(found) == K
            yield seconds


def main() -> int:
    """Measures and prints."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rows", type=int, default=100_000)
    arguments.add_argument("--calls", type=int, default=1000)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="runbook-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with embedded.running(folder / "data") as dsn:
            os.environ[bench_load.DSN_ENV] = dsn
            vectors = write_vectors(folder, options.rows)
            for layout in TABLES:
                prepare(dsn, folder, layout, options.rows)
            calls = np.random.default_rng(2).choice(vectors, options.calls + 1, replace=False)
            taken: dict[str, list[float]] = {layout: [] for layout in TABLES}
            # The first call of each plans and reads the catalogue.
            for n, turn in enumerate(zip(*(ask(folder, layout, calls) for layout in TABLES), strict=True)):
                for layout, seconds in zip(TABLES, turn, strict=True) if n else ():
                    taken[layout].append(seconds * 1000)
    print(f"{options.rows} rows, {options.calls} calls of either layout in turn, k {K}, ef_search {EF_SEARCH}")
    for layout, ms in taken.items():
        p10, *_, p95 = np.percentile(ms, [QUIET, 50, 95])
        print(f"  {layout:<11} p50 {statistics.median(ms):.2f} ms, p{QUIET} {p10:.2f} ms, p95 {p95:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
