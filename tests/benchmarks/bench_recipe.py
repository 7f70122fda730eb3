"""The tutorials' recipe against the runbook with default choices, on copies of one table, beside the same writers.

    python -m tests.benchmarks.bench_recipe [--rows 100000] [--rate 5] [--arms recipe column side_table ...]

The recipe as guides have it: add the column, embed every row and COPY the vectors into a staging table, one UPDATE,
CREATE INDEX CONCURRENTLY with the server's memory, ef_search 100 and strict order for filters, all reads at once. The
runbook is `run --execute` and one `operate refresh`, each in a process of its own. The table is the demo's, with so
many rows more of real passages, four of 3,000 to a row, a trigram index, a tsvector and three filters. Five
neighbours insert, update the text, update another column, delete and read by key, at a fixed rate, until the arm is
done. Arms that end in _crash lose the session of the UPDATE, or the runner by SIGKILL, when half of the rows are
written; what they take more than the arm without is what a crash costs.

Afterwards, with the neighbours gone, every row is embedded once more and compared with the vector that the table has;
recall is measured against exact search over the arm's own vectors, an answer as near as the last right one counting
as right. Then searches of several clients, and what a write costs, also of a copy of the table as it was. Prints for
each arm its waits, growth and own overhead by phase, and one table that compares all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
import yaml
from pgvector.psycopg import register_vector
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.cli import demo, embedded
from runbook_lib.core.names import names
from runbook_lib.core.target import load_params
from runbook_lib.embeddings import embedding
from runbook_lib.embeddings.sources import as_array
from runbook_lib.params import Params
from tests.benchmarks import bench_staying, sampling
from tests.benchmarks.bench_backfill import copy_database, rows_of_text
from tests.benchmarks.bench_writers import (
    DSN_ENV,
    FIRST_ID,
    Wait,
    neighbours,
    report,
    runbook,
    times_of,
    write_params,
)

TARGET_RECALL, K, QUERIES = 0.95, 10, 60
BATCH = 5000
SAME = 0.999
UPDATE = "one UPDATE"
TENANTS = 100
STATUSES = ("published",) * 14 + ("draft",) * 5 + ("archived",)
CATEGORIES = 40
# The phrase by the trigram index. The demo's own ranks every row that has any word, for seconds a call.
LEGACY = """
    SELECT a.id FROM demo.articles AS a
    WHERE (a.title ILIKE '%' || :query || '%' OR a.body ILIKE '%' || :query || '%')
      AND (:status::text IS NULL OR a.status = :status)
      AND (:category::text IS NULL OR a.category = :category)
      AND (:tenant::int IS NULL OR a.tenant = :tenant)
    ORDER BY a.id LIMIT :k
"""
VECTORS = {"side_table": "demo.articles t JOIN demo.articles_embedding v ON v.id = t.id"}
CLASSES: dict[str, dict[str, Any]] = {
    "no filter": {},
    "70 %": {"status": "published"},
    "5 %": {"status": "archived"},
    "2.5 %": {"category": "subject 7"},
    "1 %": {"tenant": 7},
    "0.7 %": {"tenant": 7, "status": "published"},
}


@dataclass
class Arm:
    """What an arm did. phases: name, beginning, end. recall and ms by filter class; ms are p50 and p95."""

    name: str
    phases: list[tuple[str, float, float]]
    waits: list[Wait]
    wal: int
    growth: int
    rows: int
    expected_rows: int
    missing: int
    stale: int
    recall: dict[str, float]
    ms: dict[str, tuple[float, float]]
    growth_by_phase: list[tuple[str, ...]] = field(default_factory=list)
    overhead_s: tuple[float, float, float] | None = None
    writes: dict[str, tuple[float, float]] = field(default_factory=dict)
    searches: dict[str, dict[int, tuple[float, ...]]] = field(default_factory=dict)

    @property
    def minutes(self) -> float:
        return sum(end - began for _, began, end in self.phases) / 60


def fill(dsn: str, folder: Path, rows: int) -> None:
    """The demo's table, with a third filter, and so many rows of real passages."""
    demo.load(dsn, folder)
    draw = random.Random(2)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("ALTER TABLE demo.articles ADD COLUMN tenant integer NOT NULL DEFAULT 0")
        copied = "COPY demo.articles (id, title, body, status, category, created_at, tenant) FROM STDIN"
        with connection.cursor().copy(copied) as copy:
            for key, title, body in rows_of_text(rows):
                subject = f"subject {draw.randrange(CATEGORIES)}"
                row = (FIRST_ID + key - 1, title, body, draw.choice(STATUSES), subject, "2024-02-29")
                copy.write_row((*row, draw.randrange(TENANTS)))
        connection.execute("CREATE INDEX ON demo.articles (tenant)")
        connection.execute("VACUUM ANALYZE demo.articles")


def params_file(folder: Path, layout: str, tune_queries: int | None) -> Path:
    """The parameters of :mod:`bench_writers`, with three filters, the default memory and this benchmark's target."""
    path = write_params(folder, layout)
    data = yaml.safe_load(path.read_text())
    data["target"]["filters"] = ["status", "category", "tenant"]
    data["legacy"]["query"] = LEGACY
    data["tune"] = {"target_recall": TARGET_RECALL} | ({"queries": tune_queries} if tune_queries else {})
    # What these vectors find is the recipe's answer too; 80_shadow would refuse them for the demo's judged queries.
    data["cut_over"] |= {"route": "vector", "largest_relevance_loss": 1}
    del data["index"]["maintenance_work_mem_mb"]
    path.write_text(yaml.safe_dump(data))
    return path


class Recipe:
    """The recipe's steps, each timed as a phase."""

    def __init__(self, p: Params, crash_after_s: float | None = None) -> None:
        self.p, self.crash_after_s = p, crash_after_s
        self.phases: list[tuple[str, float, float]] = []

    def run(self) -> None:
        update = "UPDATE demo.articles t SET embedding = s.embedding FROM demo.staging s WHERE s.id = t.id"
        self._timed(
            "add the column", lambda c: c.execute("ALTER TABLE demo.articles ADD COLUMN embedding vector(256)")
        )
        self._timed("embed and load", self._load)
        if self.crash_after_s:
            self._timed("the UPDATE, lost", lambda c: self._lost(c, update))
        self._timed(UPDATE, lambda c: c.execute(update))
        index = "CREATE INDEX CONCURRENTLY ON demo.articles USING hnsw (embedding vector_cosine_ops)"
        self._timed("create the index", lambda c: c.execute(index))

    def _timed(self, name: str, step: Callable[[psycopg.Connection[Any]], Any]) -> None:
        began = time.time()
        with psycopg.connect(os.environ[DSN_ENV], autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            step(connection)
        self.phases.append((name, began, time.time()))

    def _load(self, connection: psycopg.Connection[Any]) -> None:
        register_vector(connection)
        connection.execute("CREATE TABLE demo.staging (id bigint PRIMARY KEY, embedding vector(256))")
        for keys, vectors in embedded_rows(connection, self.p):
            with connection.cursor().copy("COPY demo.staging FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types(["bigint", "vector"])
                for row in zip(keys, vectors, strict=True):
                    copy.write_row(row)

    def _lost(self, connection: psycopg.Connection[Any], update: str) -> None:
        pid = connection.info.backend_pid

        def end() -> None:
            with psycopg.connect(os.environ[DSN_ENV], autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s)", [pid])

        timer = threading.Timer(self.crash_after_s or 0, end)
        timer.start()
        try:
            connection.execute(update)
        except psycopg.OperationalError:
            return
        finally:
            timer.join()
        raise AssertionError("the UPDATE was faster than before: nothing crashed")


def embedded_rows(connection: psycopg.Connection[Any], p: Params) -> Iterator[tuple[list[int], np.ndarray]]:
    """Keys and vectors of all rows as they are now, in the order of the key."""
    model, last = embedding.model(p), -1
    page = sql.SQL("SELECT t.id, {text} FROM demo.articles t WHERE t.id > %s ORDER BY t.id LIMIT %s").format(
        **names(p)
    )
    while rows := connection.execute(page, [last, BATCH]).fetchall():
        yield [r[0] for r in rows], np.asarray(model([r[1] for r in rows]), np.float32)
        last = rows[-1][0]


def crashed_runbook(path: Path, rows: int) -> None:
    """The run, its runner killed when half of the rows have their vector, and the same command once more."""
    command = [sys.executable, "-c", "from runbook_lib.cli.main import main; main()", "run", str(path), "--execute"]
    process = subprocess.Popen([*command, "--quiet"])
    with psycopg.connect(os.environ[DSN_ENV], autocommit=True) as connection:
        while process.poll() is None:
            time.sleep(0.5)
            try:
                found = connection.execute("SELECT count(embedding) FROM demo.articles").fetchone()
            except psycopg.errors.UndefinedColumn:
                continue
            if found and found[0] > rows / 2:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.send_signal(signal.SIGKILL)
                process.kill()
                process.wait()
                return
    raise AssertionError("the run was over before half of the rows were seen")


def missing_and_stale(p: Params, arm: str) -> tuple[int, int, int]:
    """Rows, those without a vector, and those with the vector of another text, by embedding every text once more."""
    missing = stale = rows = 0
    have = f"SELECT t.id, embedding FROM {VECTORS.get(arm, 'demo.articles t')} WHERE t.id = ANY (%s)"
    with psycopg.connect(os.environ[DSN_ENV], autocommit=True) as connection:
        register_vector(connection)
        for keys, fresh in embedded_rows(connection, p):
            held = dict(connection.execute(have.encode(), [keys]).fetchall())
            rows += len(keys)
            for key, vector in zip(keys, fresh, strict=True):
                if (kept := held.get(key)) is None:
                    missing += 1
                else:
                    stale += cosine(vector, as_array(kept)) < SAME
    return rows, missing, stale


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def searched(p: Params, arm: str, folder: Path) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Recall and times of the search that users get, by filter class."""
    queries, vectors = sampled_queries(p, folder)
    recall: dict[str, float] = {}
    ms: dict[str, tuple[float, float]] = {}
    with psycopg.connect(os.environ[DSN_ENV], autocommit=True) as connection:
        register_vector(connection)
        connection.execute("SELECT '[1]'::vector")
        for name, filters in CLASSES.items():
            found, times = [], []
            for text, vector in zip(queries, vectors, strict=True):
                began = time.perf_counter()
                keys = ask(connection, arm, text, vector, filters)
                times.append((time.perf_counter() - began) * 1000)
                found.append(recall_of(connection, arm, vector, filters, keys))
            recall[name] = float(np.mean(found))
            ms[name] = float(np.median(times)), float(np.percentile(times, 95))
    return recall, ms


def ask(
    connection: psycopg.Connection[Any], arm: str, text: str, vector: np.ndarray, filters: dict[str, Any]
) -> list[int]:
    """The keys that a user of this arm gets."""
    if arm.startswith("recipe"):
        where = " AND ".join(f"{column} = %({column})s" for column in filters) or "true"
        query = f"SELECT id FROM demo.articles WHERE {where} ORDER BY embedding <=> %(v)s LIMIT {K}"
        connection.execute("SET hnsw.ef_search = 100")
        connection.execute("SET hnsw.iterative_scan = strict_order")
        return [r[0] for r in connection.execute(query.encode(), {"v": vector} | filters).fetchall()]
    named = "".join(f", filter_{column} => %({column})s" for column in filters)
    call = f"SELECT * FROM demo.search_articles(%(text)s, %(v)s::real[], {K}{named})"
    values = {"text": text, "v": vector.tolist()} | filters
    return [int(r[0]) for r in connection.execute(call.encode(), values).fetchall()]


def recall_of(
    connection: psycopg.Connection[Any], arm: str, vector: np.ndarray, filters: dict[str, Any], keys: Sequence[int]
) -> float:
    """Of one answer, against exact search over the arm's vectors."""
    source = VECTORS.get(arm, "demo.articles t")
    where = " AND ".join(f"t.{column} = %({column})s" for column in filters) or "true"
    exact = (
        f"SELECT d FROM (SELECT embedding <=> %(v)s AS d FROM {source} WHERE {where} AND embedding IS NOT NULL"
        f" OFFSET 0) x ORDER BY d LIMIT {K}"
    )
    ours = f"SELECT embedding <=> %(v)s FROM {source} WHERE t.id = ANY (%(keys)s)"
    values = {"v": vector, "keys": list(keys)} | filters
    right = [r[0] for r in connection.execute(exact.encode(), values).fetchall()]
    got = [r[0] for r in connection.execute(ours.encode(), values).fetchall()]
    return sum(d <= right[-1] + 1e-6 for d in got) / len(right) if right else 1.0


def deleted(waits: list[Wait], rows: int) -> int:
    """Rows that the neighbour deleted: its keys are drawn from a seed, and one may come twice."""
    draw = random.Random("delete")
    return len({draw.randint(9 * rows // 10, rows - 1) for w in waits if w.kind == "delete"})


def sizes() -> tuple[int, int, int]:
    """WAL position, bytes of the database, rows of the table."""
    query = (
        "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint, pg_database_size(current_database()),"
        " (SELECT count(*) FROM demo.articles)"
    )
    with psycopg.connect(os.environ[DSN_ENV]) as connection:
        wal, size, rows = connection.execute(query).fetchone() or (0, 0, 0)
    return wal, size, rows


def migrate(arm: str, path: Path, rows: int, before: dict[str, Arm]) -> list[tuple[str, float, float]]:
    """Carries the arm out; returns its phases."""
    crashes, p = arm.endswith("_crash"), load_params(path)
    if arm.startswith("recipe"):
        took = (
            next((end - began for n, began, end in before["recipe"].phases if n == UPDATE), None) if crashes else None
        )
        recipe = Recipe(p, took / 2 if took else None)
        recipe.run()
        return recipe.phases
    began, phases = time.time(), list[tuple[str, float, float]]()
    if crashes:
        crashed_runbook(path, rows)
        phases, began = [("until the crash", began, time.time())], time.time()
    runbook("run", str(path), "--execute", "--quiet")
    ended = time.time()
    notebooks = [x for x in times_of(path.parent) if x[1] >= began]
    own = ended - began - sum(end - start for _, start, end in notebooks)
    return [*phases, *notebooks, ("(between notebooks)", ended - own, ended)]


def measure(server: str, arm: str, folder: Path, options: argparse.Namespace, before: dict[str, Arm]) -> Arm:
    """One arm on a copy of the table, beside the neighbours."""
    rows = options.rows
    with psycopg.connect(server, autocommit=True) as admin:
        copy_database(admin, "demo", f"arm_{arm}")
    dsn = os.environ[DSN_ENV] = make_conninfo(server, dbname=f"arm_{arm}")
    own = folder / arm
    own.mkdir()
    for name in ("queries.jsonl", "judgements.jsonl"):
        (own / name).write_bytes((folder / name).read_bytes())
    path = params_file(own, "side_table" if arm == "side_table" else "column", options.tune_queries)
    first = sizes()
    with neighbours(dsn, rows, options.rate) as waits, sampling.sampled(dsn) as samples:
        phases = migrate(arm, path, rows, before)
    if not arm.startswith("recipe"):
        # What was written since the last drain waits in the queue; a schedule does this.
        runbook("operate", str(path), "refresh", "--execute", "--quiet")
    last, p = sizes(), load_params(path)
    found, missing, stale = missing_and_stale(p, arm)
    expected = first[2] + sum(w.kind == "insert" for w in waits) - deleted(waits, rows)
    recall, ms = searched(p, arm, own)
    made = Arm(
        arm, phases, list(waits), last[0] - first[0], last[1] - first[1], found, expected, missing, stale, recall, ms
    )
    made.growth_by_phase = sampling.growth(samples, phases)
    if not arm.startswith("recipe"):
        with psycopg.connect(dsn, autocommit=True) as connection:
            made.overhead_s = sampling.overhead(connection, samples, phases)
    if not arm.endswith("_crash"):
        made.searches = searches_under_load(p, arm, own)
        made.writes = bench_staying.write_costs(dsn, rows)
    return made


def searches_under_load(p: Params, arm: str, folder: Path) -> dict[str, dict[int, tuple[float, ...]]]:
    """Searches a second and their times by number of clients: what users get, the query alone, the search of today.

    The query alone runs with the settings of the function.
    """
    texts, vectors = sampled_queries(p, folder)
    dsn = os.environ[DSN_ENV]
    bench_staying.put_queries(dsn, texts, vectors)
    source = VECTORS.get(arm, "demo.articles t")
    asked = "(SELECT v::vector(256) FROM public.asked WHERE i = :i)"
    bare = f"SELECT t.id FROM {source} ORDER BY embedding <=> {asked} LIMIT {K}"
    if arm.startswith("recipe"):
        settings = {"hnsw.ef_search": "100", "hnsw.iterative_scan": "strict_order"}
        return {"query": bench_staying.under_load(dsn, bare, QUERIES, settings)}
    with psycopg.connect(dsn) as connection:
        found = connection.execute(
            "SELECT unnest(proconfig) FROM pg_proc WHERE proname LIKE 'search_articles%' AND proconfig::text ~ 'hnsw'"
        ).fetchall()
    settings = dict(setting.split("=", 1) for (setting,) in found if setting.startswith("hnsw."))
    call = f"SELECT s.* FROM public.asked a, demo.search_articles(a.query, a.v, {K}) s WHERE a.i = :i"
    return {
        "function": bench_staying.under_load(dsn, call, QUERIES),
        "query": bench_staying.under_load(dsn, bare, QUERIES, settings),
        "legacy": bench_staying.under_load(dsn, call, QUERIES, {"runbook.route": "legacy"}),
    }


def sampled_queries(p: Params, folder: Path) -> tuple[list[str], np.ndarray]:
    """Queries that no arm tuned itself with more than another, and their vectors."""
    texts = [json.loads(line)["text"] for line in (folder / "queries.jsonl").read_text().splitlines()]
    queries = random.Random(3).sample(texts, QUERIES)
    return queries, np.asarray(embedding.model(p)(queries), np.float32)


def compare(arms: list[Arm]) -> None:
    """Prints the table of all arms."""
    lines: dict[str, Callable[[Arm], str]] = {
        "minutes": lambda a: f"{a.minutes:.1f}",
        "write p99, longest, ms": lambda a: spread([w.ms for w in a.waits if w.kind != "read"]),
        "read p99, longest, ms": lambda a: spread([w.ms for w in a.waits if w.kind == "read"]),
        "writes": lambda a: str(sum(w.kind != "read" for w in a.waits)),
        "WAL, MB": lambda a: f"{a.wal / 2**20:,.0f}",
        "growth, MB": lambda a: f"{a.growth / 2**20:,.0f}",
        "lost, missing, stale": lambda a: f"{a.expected_rows - a.rows}, {a.missing}, {a.stale}",
    }
    lines |= {f"recall, {c}": lambda a, c=c: f"{a.recall[c]:.3f}" for c in CLASSES}  # type: ignore[misc]
    lines |= {f"ms p50/p95, {c}": lambda a, c=c: "{:.1f}/{:.1f}".format(*a.ms[c]) for c in CLASSES}  # type: ignore[misc]
    for of in ("function", "query", "legacy"):
        for n in bench_staying.CLIENTS:
            lines[f"{of}, {n} clients: a second, p50, p95, p99 ms"] = lambda a, of=of, n=n: (  # type: ignore[misc]
                ", ".join(f"{x:.1f}" for x in a.searches[of][n]) if of in a.searches else "–"
            )
    for kind in ("insert", "text update", "other update"):
        lines[f"{kind}: median ms, kB of WAL"] = lambda a, kind=kind: (  # type: ignore[misc]
            "{:.2f}, {:.1f}".format(*a.writes[kind]) if a.writes else "–"
        )
    print("| | " + " | ".join(a.name for a in arms) + " |")
    print("|---" * (len(arms) + 1) + "|")
    for what, shown in lines.items():
        print(f"| {what} | " + " | ".join(shown(a) for a in arms) + " |")
    sys.stdout.flush()


def show_growth(arm: Arm) -> None:
    """Prints what each phase took, and what was the runbook's own of it."""
    print("| phase | s | WAL MB | disk MB | memory MB |\n|---|---|---|---|---|")
    for row in arm.growth_by_phase:
        print(f"| {' | '.join(row)} |")
    if arm.overhead_s:
        work, asked, own = arm.overhead_s
        share = own / (work + asked + own)
        print(
            f"embedding, COPY, writes and build {work:.0f} s, queries {asked:.0f} s, its own {own:.0f} s, {share:.1%}"
        )


def spread(ms: list[float]) -> str:
    return f"{np.percentile(ms, 99):,.0f}, {max(ms):,.0f}"


def main() -> int:
    """Measures each arm once and compares; 1 where a runbook's arm lost a row, or left one missing or stale."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rows", type=int, default=100_000)
    arguments.add_argument("--rate", type=float, default=5.0, help="statements a second of each neighbour")
    arguments.add_argument(
        "--tune-queries", type=int, help="fewer than the default of tune.queries, for a quick look"
    )
    arguments.add_argument("--arms", nargs="+", default=["recipe", "column", "side_table"])
    arguments.add_argument("--save", type=Path, help="a file for all figures")
    options = arguments.parse_args()
    arms: dict[str, Arm] = {}
    with tempfile.TemporaryDirectory(prefix="runbook-bench-") as made, embedded.running(Path(made, "data")) as server:
        folder = Path(made)
        fill(demo.create_database(server), folder, options.rows)
        for name in options.arms:
            arm = arms[name] = measure(server, name, folder, options, arms)
            load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
            print(f"{name}: {options.rows} rows, {arm.minutes:.1f} minutes, load {load}")
            report(arm.waits, arm.phases)
            show_growth(arm)
            compare([arm])
            if options.save:
                options.save.write_text(json.dumps([dataclasses.asdict(a) for a in arms.values()]))
        before = make_conninfo(server, dbname="demo")
        found = bench_staying.write_costs(before, options.rows)
        print("before:", ", ".join("{}: {:.2f} ms, {:.1f} kB of WAL".format(k, *v) for k, v in found.items()))
    compare(list(arms.values()))
    wrong = [a.name for a in arms.values() if not a.name.startswith("recipe") and (a.missing or a.stale)]
    wrong += [a.name for a in arms.values() if a.rows != a.expected_rows]
    print(
        f"rows lost, missing or stale: {', '.join(wrong)}"
        if wrong
        else "the runbook lost no row, and left none stale"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
