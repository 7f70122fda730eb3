"""The loader's memory does not grow with the file: ten times the rows, the same high-water mark."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runbook_lib.migrate import expand_schema, extension
from tests.conftest import write_params
from tests.drills import kit

FEW, MANY = 20_000, 200_000
DIMENSION = 64
# All the vectors of the larger file alone are 49 MB. What the allocator keeps differs from run to run by some MB.
MOST_GROWTH_MB = 20
LOAD = """
import sys
from pathlib import Path
from runbook_lib.migrate import load_embeddings
from tests.drills import kit

with kit.opened(Path(sys.argv[1]), "40_load_embeddings") as phase:
    load_embeddings.apply(phase)
print(next(x.split()[1] for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")))
"""


def write_file(path: Path, rows: int) -> None:
    vectors = np.random.default_rng(1).standard_normal((rows, DIMENSION), dtype=np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIMENSION).cast(pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": np.arange(1, rows + 1), "embedding": lists}), path)


def most_memory_mb(params_file: Path) -> float:
    """The most that a process took which loaded this file."""
    command = [sys.executable, "-c", LOAD, str(params_file)]
    done = subprocess.run(command, cwd=kit.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the high-water mark is read from /proc")
def test_ten_times_the_rows_take_no_more_memory(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE articles (id bigint PRIMARY KEY, body text NOT NULL)")
        connection.execute("INSERT INTO articles SELECT i, 'row ' || i FROM generate_series(1, %s) i", [MANY])
        connection.execute("ANALYZE articles")
        sections: dict[str, Any] = {
            "target": {"text_columns": ["body"]},
            "vector": {"dimension": DIMENSION},
            "search": {"fulltext_column": None},
        }
        most = []
        for rows in (FEW, MANY):
            write_file(tmp_path / f"{rows}.parquet", rows)
            source = {"source": "file", "file": f"{rows}.parquet", "callable": None}
            params_file = write_params(tmp_path, embeddings=source, **sections)
            with kit.opened(params_file) as phase:
                extension.apply(phase)
                expand_schema.apply(phase)
            most.append(most_memory_mb(params_file))
            staged = connection.execute("SELECT count(*) FROM runbook.articles_staging").fetchone()
            assert staged == (rows,)
    assert most[1] - most[0] < MOST_GROWTH_MB, most
