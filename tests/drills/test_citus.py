"""The whole way on a real cluster, which RUNBOOK_CITUS_DSN names; skipped without one.

It is a database on the coordinator with the extensions citus and vector, in which the role may create. The role needs
no superuser, but pg_monitor on every node. The test makes and drops table public.articles and schema runbook there.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from runbook_lib.backfill import change_queue
from runbook_lib.benchmark import comparison, index_recall
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, LockNotObtained, RunbookError
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.core.target import load_params
from runbook_lib.migrate import build_index, inputs
from runbook_lib.params import Params
from tests import toy
from tests.conftest import DSN_ENV, write_params
from tests.drills import kit
from tests.evidence import assert_every_row_has_the_vector_of_its_text
from tests.opened import opened_for_a_while
from tests.servers import dump
from tests.stepping import step, step_all

DSN = os.environ.get("RUNBOOK_CITUS_DSN", "")
pytestmark = [pytest.mark.drill, pytest.mark.skipif(not DSN, reason="RUNBOOK_CITUS_DSN names no cluster")]

Connection = psycopg.Connection[Any]
SECTIONS: dict[str, dict[str, Any]] = {
    "target": {"distributed": "citus"},
    "record": {"runs_dir": "runs"},
    "search": {"fulltext_column": None},
    # As workers have it that nobody has configured.
    "index": {"maintenance_work_mem_mb": 64},
    "cut_over": {
        "route": "vector",
        "calls_per_step": 20,
        "share_steps_percent": [100],
        "largest_relevance_loss": 1.0,
    },
    "tune": {"ef_search": [1, 4, 60], "target_recall": 0.9},
}
SHARDS = 4
# Enough for the index of a shard to be cheaper than its rows.
MANY_ROWS = 8000
MANY_TEXTS = """
    INSERT INTO articles (id, title, body)
    SELECT i, (ARRAY['cookie', 'password', 'buffer', 'index', 'query'])[1 + i %% 5] || ' leaks ' || i, md5(i::text)
    FROM generate_series(1, %s) i
"""
UP_TO_THE_INDEX = MIGRATE[: MIGRATE.index("70_tune")]


@contextmanager
def distributed(
    monkeypatch: pytest.MonkeyPatch, create: Callable[[Connection], object], column: str
) -> Iterator[Connection]:
    """The coordinator, with the table articles distributed by hash of a column; empty again afterwards."""
    monkeypatch.setenv(DSN_ENV, DSN)
    # So few rows are searched within milliseconds by any way, and messages between nodes take longer.
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 5000)
    with psycopg.connect(DSN, autocommit=True) as connection:
        _sweep(connection)
        create(connection)
        connection.execute(f"SET citus.shard_count = {SHARDS}")
        connection.execute("SELECT create_distributed_table('articles', %s)", [column])
        connection.execute("ANALYZE articles")
        yield connection
    # Afresh: the connection may hold one to a worker that was stopped.
    with psycopg.connect(DSN, autocommit=True) as connection:
        _sweep(connection)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    """The same with the toy table, distributed by its key."""
    with distributed(monkeypatch, lambda c: toy.create_articles(c, trigram=False), "id") as connection:
        yield connection


def _sweep(connection: Connection) -> None:
    connection.execute("SET citus.multi_shard_modify_mode = 'sequential'")
    connection.execute("SET citus.enable_unsafe_triggers = on")
    connection.execute("DROP TABLE IF EXISTS articles CASCADE")
    connection.execute("DROP SCHEMA IF EXISTS runbook CASCADE")
    found = connection.execute("SELECT oid::regprocedure::text FROM pg_proc WHERE proname = 'search_articles'")
    for (function,) in found.fetchall():
        connection.execute(f"DROP FUNCTION {function} CASCADE")


def _workers(connection: Connection) -> list[str]:
    found = connection.execute("SELECT nodename, nodeport FROM pg_dist_node WHERE groupid > 0 ORDER BY nodeport")
    return [make_conninfo(DSN, host=host, port=port) for host, port in found.fetchall()]


def _queued(connection: Connection) -> list[int]:
    return [key for (key,) in connection.execute("SELECT key FROM runbook.articles_queue ORDER BY key").fetchall()]


def test_there_and_back_with_answers_from_every_node(cluster: Connection, tmp_path: Path) -> None:
    before = dump(DSN)
    path = write_params(tmp_path, **SECTIONS)
    step_all("migrate", MIGRATE, path)
    assert cluster.execute("SELECT route, share_percent FROM runbook.route").fetchall() == [("vector", 100)]
    assert assert_every_row_has_the_vector_of_its_text(cluster) == toy.ROWS
    vector = toy.embed(["cookie leaks"])[0].tolist()
    for dsn in [DSN, *_workers(cluster)]:
        with psycopg.connect(dsn, autocommit=True) as node:
            call = "SELECT id, answered_by FROM search_articles('cookie leaks', %s::real[], 3)"
            answers = node.execute(call, [vector]).fetchall()
        assert {a for _, a in answers} == {"vector"} and {i for i, _ in answers} <= toy.nearest("cookie leaks")
    cluster.execute("UPDATE articles SET title = 'thread blocks', body = NULL WHERE id IN (1, 2, 3)")
    step("operate/refresh", path)
    assert _queued(cluster) == []
    assert assert_every_row_has_the_vector_of_its_text(cluster) == toy.ROWS
    step_all("undo", UNDO, path)
    assert dump(DSN) == before
    left = cluster.execute("""
        SELECT count(*) FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
        WHERE d.datname = current_database() AND s.setconfig::text LIKE '%hnsw%'
    """)
    assert left.fetchone() == (0,)


def test_the_whole_way_with_many_rows_and_an_equal_dump_after_undo(
    cluster: Connection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RUNBOOK_CITUS_ROWS says how many; prints what each phase took."""
    cluster.execute("DELETE FROM articles")
    cluster.execute(MANY_TEXTS, [int(os.environ.get("RUNBOOK_CITUS_ROWS", "4000"))])
    cluster.execute("ANALYZE articles")
    before = dump(DSN)
    own = {
        "backfill": {"workers": 2},
        "embeddings": {"callable": "tests.toy:embed_apart"},
        "tune": {"ef_search": [40, 100, 400], "target_recall": 0.9},
    }
    sections = {**SECTIONS, **own}
    path = write_params(tmp_path, **sections)
    took = []
    for name in (*(f"migrate/{n}" for n in MIGRATE), "operate/refresh", "operate/monitor", *UNDO):
        began = time.perf_counter()
        step(name, path)
        took.append(f"{name} {time.perf_counter() - began:.1f} s")
        if name == "migrate/90_cut_over":
            counts = "SELECT count(*) = count(embedding) FROM articles"
            assert cluster.execute(counts).fetchone() == (True,)
    with capsys.disabled():
        print("\n" + "\n".join(took))
    assert dump(DSN) == before


def test_searches_are_filtered_by_columns_and_by_what_every_search_asks_for(
    cluster: Connection, tmp_path: Path
) -> None:
    cluster.execute(
        "UPDATE articles SET status = CASE id % 3 WHEN 0 THEN 'Stable' WHEN 1 THEN 'Draft' ELSE 'Old' END"
    )
    cluster.execute("ANALYZE articles")
    target = SECTIONS["target"] | {"filters": ["status"], "always": "t.status <> 'Old'"}
    path = write_params(tmp_path, **{**SECTIONS, "target": target})
    step_all("migrate", MIGRATE, path)
    vector = toy.embed(["cookie leaks"])[0].tolist()
    rows = "SELECT id, embedding::real[] FROM articles WHERE status = 'Draft'"
    found = cluster.execute(rows).fetchall()
    near = sorted(((float(np.dot(e, vector)), i) for i, e in found if e is not None), reverse=True)
    for dsn in [DSN, *_workers(cluster)]:
        with psycopg.connect(dsn, autocommit=True) as node:
            call = (
                "SELECT id, similarity FROM search_articles('cookie leaks', %s::real[], 5, filter_status => 'Draft')"
            )
            answers = node.execute(call, [vector]).fetchall()
        assert [s for _, s in answers] == pytest.approx([s for s, _ in near[:5]], abs=1e-5)
        assert {i for i, _ in answers} <= {i for i, _ in found}
    step("operate/monitor", path)


def test_live_calls_on_every_node_are_answered_twice_and_logged(cluster: Connection, tmp_path: Path) -> None:
    path = write_params(tmp_path, **SECTIONS, shadow={"sample_percent": 100, "calls_per_minute": 1000})
    step_all("migrate", MIGRATE[: MIGRATE.index("90_cut_over")], path)
    vector = toy.embed(["cookie leaks"])[0].tolist()
    nodes = [DSN, *_workers(cluster)]
    for dsn in nodes:
        with psycopg.connect(dsn, autocommit=True) as node:
            call = "SELECT id, answered_by FROM search_articles_shadow('cookie leaks', %s::real[], 3)"
            assert {by for _, by in node.execute(call, [vector]).fetchall()} == {"legacy"}
    logged = "SELECT live_route, other_route, problem, cardinality(other_keys) FROM runbook.articles_shadow_log"
    assert cluster.execute(logged).fetchall() == [("legacy", "vector", None, 3)] * len(nodes)
    step("migrate/90_cut_over", path)
    step_all("undo", UNDO, path)


def test_two_sessions_never_claim_the_same_change(cluster: Connection, tmp_path: Path) -> None:
    path = write_params(tmp_path, **SECTIONS)
    step_all("migrate", MIGRATE[: MIGRATE.index("60_build_index")], path)
    cluster.execute("UPDATE articles SET body = body || ' again' WHERE title IS NOT NULL")
    claim = change_queue.SQL["claim"]
    values = {"tries": 3, "lease_s": 900, "batch_rows": 10, "put_off": [], "class": change_queue.LOCK_CLASS}
    p, claimed = load_params(path), list[int]()
    with cluster.cursor() as cursor:
        (until,) = cursor.execute("SELECT clock_timestamp()").fetchone() or (None,)
    start = threading.Barrier(2)

    def take(worker: int) -> None:
        with db.connect(p, f"drill claims {worker}") as connection:
            start.wait()
            for _ in range(30):
                statement = db.statement(claim, p, **values, worker=worker, until=until)
                with suppress(psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable):
                    found = connection.execute(statement.query, statement.values).fetchall()
                    claimed.extend(row["id"] for row in found)

    threads = [threading.Thread(target=take, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) > toy.ROWS / 2
    cluster.execute("UPDATE runbook.articles_queue SET claimed_by = NULL, claimed_at = NULL")
    with kit.in_a_process("refresh", path) as other:
        step("operate/refresh", path)
        other.wait(kit.LONGEST_STEP_S)
    step("operate/refresh", path)
    assert _queued(cluster) == []
    assert assert_every_row_has_the_vector_of_its_text(cluster) == toy.ROWS


def test_changes_are_captured_from_every_node_and_after_a_shard_moved(cluster: Connection, tmp_path: Path) -> None:
    path = write_params(tmp_path, **SECTIONS)
    step_all("migrate", MIGRATE[: MIGRATE.index("40_load_embeddings")], path)
    nodes = [DSN, *_workers(cluster)]
    for i, dsn in enumerate(nodes):
        with psycopg.connect(dsn, autocommit=True) as node:
            node.execute(f"UPDATE articles SET title = 'changed {i}' WHERE id IN ({10 * i + 1}, {10 * i + 2})")
            node.execute(f"UPDATE articles SET views = views + 1 WHERE id = {10 * i + 3}")
    changed = [10 * i + n for i in range(len(nodes)) for n in (1, 2)]
    assert _queued(cluster) == changed
    moved = """
        SELECT citus_move_shard_placement(p.shardid, p.nodename, p.nodeport, n.nodename, n.nodeport, 'block_writes')
        FROM citus_shards p JOIN pg_dist_node n ON n.groupid > 0 AND n.nodeport <> p.nodeport
        WHERE p.shardid = get_shard_id_for_distribution_column('articles', 50) AND p.table_name = 'articles'::regclass
        LIMIT 1
    """
    cluster.execute(moved)
    cluster.execute("UPDATE articles SET title = 'changed after' WHERE id = 50")
    assert _queued(cluster) == [*changed, 50]
    step_all("migrate", ["40_load_embeddings", "50_backfill"], path)
    assert _queued(cluster) == []
    assert assert_every_row_has_the_vector_of_its_text(cluster) == toy.ROWS


def test_the_recall_of_each_setting_is_that_of_numpy_on_the_same_vectors(cluster: Connection, tmp_path: Path) -> None:
    cluster.execute("DELETE FROM articles")
    cluster.execute(MANY_TEXTS, [MANY_ROWS])
    cluster.execute("ANALYZE articles")
    path = write_params(tmp_path, **SECTIONS, embeddings={"callable": "tests.toy:embed_apart"})
    step_all("migrate", UP_TO_THE_INDEX, path)
    params = load_params(path)
    rows = cluster.execute("SELECT id, embedding::real[] FROM articles").fetchall()
    keys, vectors = [str(row[0]) for row in rows], np.array([row[1] for row in rows])
    found = dict[int, float]()
    with db.connect(params, "drill") as connection:
        asked = index_recall.questions(connection, params)
        for ef in (1, 2, 10, 200):
            settings = {"hnsw.ef_search": str(ef), "hnsw.iterative_scan": "off"}
            measured = index_recall.through(connection, params, asked, "articles_embedding_hnsw", (), settings)
            assert measured is not None, "the plan of a task reads the shard's index"
            mine = _recall(connection, params, [q.vector for q in asked], keys, vectors, settings)
            assert measured.recall == pytest.approx(mine, abs=1e-4)
            found[ef] = measured.recall
    assert found[1] < found[10] <= found[200], "settings reach the workers"


def _recall(
    connection: db.Connection,
    params: Params,
    asked: list[Any],
    keys: list[str],
    vectors: np.ndarray,
    settings: dict[str, str],
) -> float:
    """The share of the ten nearest, by numpy; of rows at one distance any is right."""
    shares = []
    place = {key: i for i, key in enumerate(keys)}
    with connection.transaction():
        for name, value in settings.items():
            connection.execute(f"SET LOCAL {name} = '{value}'")
        for vector in asked:
            own = np.asarray(vector, dtype=np.float64)
            distances = 1 - vectors @ own / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(own))
            farthest = np.sort(distances)[params.queries.k - 1] + 1e-6
            query = f"SELECT id FROM articles ORDER BY embedding <=> '{json.dumps(own.tolist())}' LIMIT 10"
            got = connection.execute(query).fetchall()
            shares.append(sum(distances[place[str(row["id"])]] <= farthest for row in got) / params.queries.k)
    return float(np.mean(shares))


INDEX = "articles_embedding_hnsw"
ITS_SHARDS = """
    SELECT c.relname::text, c.oid::bigint, i.indisvalid FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid
    WHERE c.relname LIKE 'articles_embedding_hnsw_%' ORDER BY 1
"""

SHARDS_OF_TABLE = "SELECT shardid FROM pg_dist_shard WHERE logicalrelid = 'articles'::regclass"


@contextmanager
def _by_hand(worker: str) -> Iterator[Connection]:
    """On one worker, which sees its shards, and may change them."""
    with psycopg.connect(worker, autocommit=True) as node:
        node.execute("SET citus.override_table_visibility = off")
        node.execute("SET citus.enable_manual_changes_to_shards = on")
        yield node


def _shard_indexes(connection: Connection) -> dict[str, tuple[int, bool]]:
    """By name: oid, and whether it is valid."""
    found = dict[str, tuple[int, bool]]()
    for worker in _workers(connection):
        with _by_hand(worker) as node:
            found |= {name: (oid, valid) for name, oid, valid in node.execute(ITS_SHARDS).fetchall()}
    return found


@contextmanager
def _cancelled_on_a_shard(worker: str, shard: int) -> Iterator[None]:
    """A writer of this shard keeps a build waiting at its end, which is then cancelled on its worker."""
    waits = f"""
        SELECT pg_cancel_backend(pid) FROM pg_stat_activity
        WHERE query LIKE 'CREATE  INDEX CONCURRENTLY  {INDEX}_{shard} %' AND wait_event_type = 'Lock'
    """
    over = threading.Event()

    def cancel() -> None:
        with psycopg.connect(worker, autocommit=True) as node:
            while not over.wait(0.1) and not node.execute(waits).fetchall():
                pass

    with _by_hand(worker) as writer, writer.transaction(force_rollback=True):
        writer.execute(f"UPDATE articles_{shard} SET views = views")
        thread = threading.Thread(target=cancel)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _is_valid(path: Path) -> Gate:
    with opened_for_a_while(load_params(path), "60_build_index") as phase:
        (found,) = [g for g in build_index.verify(phase) if g.name == "index.is_valid"]
    return found


def test_an_index_that_failed_on_one_shard_is_named_and_built_there_alone(
    cluster: Connection, tmp_path: Path
) -> None:
    path = write_params(tmp_path, **SECTIONS)
    step_all("migrate", MIGRATE[: MIGRATE.index("60_build_index")], path)
    worker = _workers(cluster)[0]
    port = psycopg.conninfo.conninfo_to_dict(worker)["port"]
    on_it = "SELECT shardid FROM citus_shards WHERE table_name = 'articles'::regclass AND nodeport = %s ORDER BY 1"
    shards = [shard for (shard,) in cluster.execute(on_it, [port]).fetchall()]
    with _cancelled_on_a_shard(worker, shards[0]), pytest.raises(psycopg.errors.QueryCanceled):
        step("migrate/60_build_index", path)
    before = _shard_indexes(cluster)
    # Citus gives up the builds of other shards that were not at their end, or not begun.
    everywhere = {f"{INDEX}_{s}" for (s,) in cluster.execute(SHARDS_OF_TABLE).fetchall()}
    broken = {name for name in everywhere if name not in before or not before[name][1]}
    assert f"{INDEX}_{shards[0]}" in broken and len(broken) < len(everywhere) == SHARDS
    assert f"that of public.articles_{shards[0]} on 127.0.0.1:{port} is invalid" in _is_valid(path).found
    step("migrate/60_build_index", path)
    after = _shard_indexes(cluster)
    assert {name for name in after if after[name] != before.get(name)} == broken
    assert all(valid for _, valid in after.values())
    # One that is gone, of which the coordinator hears nothing.
    with _by_hand(worker) as node:
        node.execute(f"DROP INDEX {INDEX}_{shards[1]}")
    said = f"invalid: that of public.articles_{shards[1]} on 127.0.0.1:{port} is missing; of {SHARDS} shards"
    assert _is_valid(path).found == said
    step("migrate/60_build_index", path)
    again = _shard_indexes(cluster)
    assert {name for name in again if again[name] != after[name]} == {f"{INDEX}_{shards[1]}"}
    assert _is_valid(path).found.startswith(f"valid, on each of {SHARDS} shards")
    known = "SELECT result FROM run_command_on_all_nodes($$ SELECT indisvalid FROM pg_index"
    known += " WHERE indexrelid = to_regclass('articles_embedding_hnsw') $$)"
    assert {result for (result,) in cluster.execute(known).fetchall()} == {"t"}
    step("undo/index", path)
    assert _shard_indexes(cluster) == {}


# Commands that stop and start a worker, for the drills that need one gone.
STOP, START = (os.environ.get(f"RUNBOOK_CITUS_{verb}", "") for verb in ("STOP", "START"))
REACHABLE = "SELECT bool_and(success) FROM run_command_on_workers('SELECT 1')"
BUILDS = """
    SELECT bool_or(success AND result = '1') FROM run_command_on_workers($$
        SELECT least(count(*), 1) FROM pg_stat_activity
        WHERE query LIKE 'CREATE  INDEX CONCURRENTLY  articles_%' AND wait_event_type = 'Lock'
    $$)
"""
# By phase: when the fault comes.
MOMENTS = {
    "40_load_embeddings": "SELECT count(*) >= 40 FROM runbook.articles_staging",
    "50_backfill": "SELECT count(embedding) >= 40 FROM articles",
    "60_build_index": BUILDS,
}


def _run(command: str) -> None:
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def _once(question: str, act: Callable[[Connection], None]) -> Iterator[list[bool]]:
    """Acts beside the block once the cluster says yes to a question; yields whether it did."""
    acted, over = list[bool](), threading.Event()

    def watch() -> None:
        with psycopg.connect(DSN, autocommit=True) as connection:
            while not over.wait(0.02):
                row = connection.execute(question).fetchone()
                if row and row[0]:
                    act(connection)
                    acted.append(True)
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield acted
    finally:
        over.set()
        thread.join()


@contextmanager
def _writers_on_every_worker(connection: Connection) -> Iterator[None]:
    """Open transactions on one shard of each worker: a build waits for them."""
    with ExitStack() as held:
        for worker in _workers(connection):
            node = held.enter_context(_by_hand(worker))
            port = psycopg.conninfo.conninfo_to_dict(worker)["port"]
            placed = "SELECT min(shardid) FROM citus_shards WHERE table_name = 'articles'::regclass AND nodeport = %s"
            row = connection.execute(placed, [port]).fetchone()
            node.execute("BEGIN")
            node.execute(f"UPDATE articles_{row[0] if row else 0} SET views = views")
            # The end of a session that was cut off is no news.
            held.callback(node.close)
        yield


def _again(notebook: str, path: Path) -> None:
    """What a scheduler does: the same notebook again, until it passes; a worker that restarts takes a moment."""
    for tries in range(5):
        try:
            step(notebook, path)
            return
        except (psycopg.Error, LockNotObtained):
            if tries == 4:
                raise
            time.sleep(1)


def _goes_on_and_has_lost_nothing(cluster: Connection, path: Path, phase: str) -> None:
    cluster.execute("UPDATE articles SET title = 'changed after' WHERE id IN (4, 5, 6)")
    for name in MIGRATE[MIGRATE.index(phase) : MIGRATE.index("70_tune")]:
        _again(f"migrate/{name}", path)
    step("operate/refresh", path)
    assert assert_every_row_has_the_vector_of_its_text(cluster) == toy.ROWS
    assert all(valid for _, valid in _shard_indexes(cluster).values()) and len(_shard_indexes(cluster)) == SHARDS


@pytest.mark.skipif(not (STOP and START), reason="RUNBOOK_CITUS_STOP and RUNBOOK_CITUS_START stop no worker")
@pytest.mark.parametrize("phase", MOMENTS)
def test_a_worker_that_is_stopped_in_a_phase_loses_nothing(cluster: Connection, tmp_path: Path, phase: str) -> None:
    path = write_params(tmp_path, **{**SECTIONS, **kit.SLOW})
    step_all("migrate", MIGRATE[: MIGRATE.index(phase)], path)
    cluster.execute("UPDATE articles SET title = 'changed before' WHERE id IN (1, 2, 3)")
    writers = _writers_on_every_worker(cluster) if phase == "60_build_index" else nullcontext()
    broken = pytest.raises((psycopg.Error, RunbookError))
    try:
        with writers, _once(MOMENTS[phase], lambda _: _run(STOP)) as stopped, broken:
            step(f"migrate/{phase}", path)
        assert stopped, "the worker was stopped while the phase was at work"
    finally:
        _run(START)
    kit.wait_for(lambda: cluster.execute(REACHABLE).fetchone() == (True,), "the worker is there again")
    _goes_on_and_has_lost_nothing(cluster, path, phase)


def _move(connection: Connection) -> None:
    """One shard, with those that lie with it, to the other worker."""
    connection.execute("""
        SELECT citus_move_shard_placement(p.shardid, p.nodename, p.nodeport, n.nodename, n.nodeport, 'block_writes')
        FROM citus_shards p JOIN pg_dist_node n ON n.groupid > 0 AND n.nodeport <> p.nodeport
        WHERE p.table_name = 'articles'::regclass ORDER BY p.shardid LIMIT 1
    """)


@pytest.mark.parametrize("phase", ["40_load_embeddings", "50_backfill"])
def test_a_shard_that_moves_during_a_phase_takes_its_rows_along(
    cluster: Connection, tmp_path: Path, phase: str
) -> None:
    path = write_params(tmp_path, **{**SECTIONS, **kit.SLOW})
    step_all("migrate", MIGRATE[: MIGRATE.index(phase)], path)
    cluster.execute("UPDATE articles SET title = 'changed before' WHERE id IN (1, 2, 3)")
    with _once(MOMENTS[phase], _move) as moved, suppress(psycopg.Error, LockNotObtained):
        step(f"migrate/{phase}", path)
    assert moved, "the shard was moved while the phase was at work"
    _goes_on_and_has_lost_nothing(cluster, path, phase)


BY_ITS_KEY = "inputs.distributed_by_its_key"
BY_STATUS = """
    ALTER TABLE articles DROP CONSTRAINT articles_pkey; CREATE UNIQUE INDEX ON articles (id, status);
    SELECT create_distributed_table('articles', 'status')
"""
REFUSED = {
    "reference": ("SELECT create_reference_table('articles')", BY_ITS_KEY, "as a reference table"),
    "local": ("SELECT citus_add_local_table_to_metadata('articles')", BY_ITS_KEY, "local table"),
    "append": (
        "TRUNCATE articles; SELECT create_distributed_table('articles', 'id', 'append')",
        BY_ITS_KEY,
        "distributed by append",
    ),
    "other column": (BY_STATUS, BY_ITS_KEY, "distributed by hash of status"),
    "columnar": (
        "ALTER TABLE articles DROP CONSTRAINT articles_pkey;"
        "SELECT alter_table_set_access_method('articles', 'columnar')",
        "inputs.table_is_not_columnar",
        "columnar",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tables_that_cannot_be_migrated_are_refused_with_the_reason(
    cluster: Connection, tmp_path: Path, kind: str
) -> None:
    make, gate, found = REFUSED[kind]
    cluster.execute("DROP TABLE articles")
    cluster.execute("CREATE TABLE articles (id bigint PRIMARY KEY, title text, body text, status text, views int)")
    cluster.execute("INSERT INTO articles VALUES (1, 'cookie leaks', 'the cookie leaks', 'Stable', 0)")
    if kind == "columnar" and not cluster.execute("SELECT 1 FROM pg_am WHERE amname = 'columnar'").fetchone():
        pytest.skip("the database has no extension citus_columnar")
    for command in make.split(";"):
        cluster.execute(command)
    sections = {k: v for k, v in SECTIONS.items() if k != "target"}
    failed = {g.name: g for g in inputs.input_problems(load_params(write_params(tmp_path, **sections))).failed}
    assert gate in failed and found in failed[gate].found


def test_an_operation_that_cannot_be_there_refuses_before_anything(cluster: Connection, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"step\.works_on_a_distributed_table"):
        step("operate/rebuild_index", write_params(tmp_path, **SECTIONS))
