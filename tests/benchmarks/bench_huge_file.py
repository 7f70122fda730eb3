"""A Parquet file of ten gigabytes through phase 40, and the most memory that the loader took for it.

    python -m tests.benchmarks.bench_huge_file [--gb 10] [--most-minutes 15]

The file has row groups of a million rows, as pyarrow writes them if nobody says otherwise: 4 GB each. The load is the
phase's own, into the real staging table of a server made for it, in a process of its own; its memory is the kernel's
high-water mark (VmHWM), mapped pages included. It is stopped after ``--most-minutes`` and says how far it came.
Needs about four times the file's size on disk, all of it given back. Ends with status 1 where the promise is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq

from runbook_lib.cli import embedded
from runbook_lib.migrate import expand_schema, extension
from tests.benchmarks import bench_load

DIMENSION = 1024
ROWS_A_GROUP = 1_000_000
MOST_MB = 1024
GB = 10**9
CREATE = """
CREATE TABLE articles (id bigint PRIMARY KEY, body text NOT NULL);
INSERT INTO articles SELECT i, md5(i::text) FROM generate_series(1, %s) i;
VACUUM ANALYZE articles;
"""


def write_file(path: Path, rows: int) -> None:
    """Keys from 1, vectors of random numbers, uncompressed."""
    part = min(ROWS_A_GROUP, rows)
    numbers = np.random.default_rng(1).standard_normal((part, DIMENSION), dtype=np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), DIMENSION).cast(pa.list_(pa.float32()))
    table_schema = pa.schema([("id", pa.int64()), ("embedding", pa.list_(pa.float32()))])
    with pq.ParquetWriter(path, table_schema, compression="none", use_dictionary=False) as out:
        for start in range(0, rows, part):
            n = min(part, rows - start)
            keys = pa.array(np.arange(start + 1, start + n + 1))
            group = pa.Table.from_arrays([keys, vectors.slice(0, n)], schema=table_schema)
            out.write_table(group, row_group_size=ROWS_A_GROUP)


def staged(dsn: str) -> int:
    """Rows in the staging table."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute("SELECT count(*) FROM runbook.articles_staging").fetchone()
    return row[0] if row else 0


def most_memory_mb(pid: int) -> float:
    """VmHWM of a process, 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def _load(folder: Path) -> None:
    bench_load.DIMENSION = DIMENSION
    bench_load.from_source(folder, "parquet")


def load(folder: Path, most_s: float) -> tuple[float, float, bool]:
    """Most memory in MB, seconds, and whether the load came to its end."""
    process = get_context("spawn").Process(target=_load, args=(folder,))
    began, most = time.perf_counter(), 0.0
    process.start()
    while process.is_alive() and time.perf_counter() - began < most_s:
        most = max(most, most_memory_mb(process.pid or 0))
        process.join(0.2)
    seconds, ended = time.perf_counter() - began, process.exitcode == 0
    process.kill()
    process.join()
    return most, seconds, ended


def main() -> int:
    """Measures, prints, and judges."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--gb", type=float, default=10.5)
    arguments.add_argument("--most-minutes", type=float, default=15)
    options = arguments.parse_args()
    rows = int(options.gb * GB / (DIMENSION * 4))
    bench_load.DIMENSION = DIMENSION
    with tempfile.TemporaryDirectory(prefix="runbook-huge-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_file(folder / "vectors.parquet", rows)
        size = (folder / "vectors.parquet").stat().st_size / GB
        with embedded.running(folder / "data") as dsn:
            os.environ[bench_load.DSN_ENV] = dsn
            with psycopg.connect(dsn, autocommit=True) as connection:
                for statement in CREATE.strip().split(";\n"):
                    connection.execute(statement.replace("%s", str(rows)))
            with bench_load.opened(folder) as phase:
                phase.ledger.create()
                extension.apply(phase)
                expand_schema.apply(phase)
            most, seconds, ended = load(folder, options.most_minutes * 60)
            done = staged(dsn)
    print(f"{size:.1f} GB of Parquet, {rows} rows of {DIMENSION} dimensions in groups of {ROWS_A_GROUP}")
    print(f"  {done} rows staged in {seconds:.0f} s{'' if ended else ', stopped there'}")
    print(f"  the loader took {most:.0f} MB at its most, {MOST_MB} MB are allowed")
    return int(most > MOST_MB or (ended and done != rows))


if __name__ == "__main__":
    sys.exit(main())
