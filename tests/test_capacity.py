"""Does the plan fit into the server: looked at where it can be, stated where not, and never passed unseen."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.core.gates import Gate
from runbook_lib.core.phase import Phase
from runbook_lib.indexes import forecast
from runbook_lib.indexes.forecast import MB, Forecast
from runbook_lib.migrate import capacity, node_capacity, preflight
from runbook_lib.params import Params

Connection = psycopg.Connection[Any]
Open = Callable[..., Phase]
MakeParams = Callable[..., Params]


def _gate(phase: Phase, name: str, **other: Any) -> Gate:
    """A gate of the plan, with other figures put into its forecast."""
    expects = replace(preflight.expected(preflight.facts(phase), phase.connection, phase.params), **other)
    (found,) = [g for g in capacity.gates(phase.connection, phase.params, expects) if g.name == f"preflight.{name}"]
    return found


def _names(phase: Phase) -> list[str]:
    expects = preflight.expected(preflight.facts(phase), phase.connection, phase.params)
    return [g.name for g in capacity.gates(phase.connection, phase.params, expects)]


def test_a_server_beside_this_process_is_looked_at(open_phase: Open) -> None:
    phase = open_phase()
    found = capacity.look(phase.connection, phase.params)
    row = phase.connection.execute("SHOW data_directory").fetchone()
    assert row is not None and found.free_disk.how == f"free at {row['data_directory']}"
    assert found.free_disk.bytes and found.free_disk.bytes > MB
    assert found.shared_memory.how == "free at /dev/shm" and found.shared_memory_type == "posix"
    assert "free at" in str(preflight.facts(phase))


def test_a_server_elsewhere_is_unknown_and_yields_no_gate(
    open_phase: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(capacity, "PROCESSES", tmp_path)
    phase = open_phase()
    facts = str(preflight.facts(phase))
    assert "UNKNOWN: the server is on another machine; state preflight.free_disk_gb, as df says there" in facts
    assert "UNKNOWN: the server is on another machine; state preflight.shared_memory_mb" in facts
    assert _names(phase) == ["preflight.memory_fits_index", "preflight.wal_slots_healthy"]


def test_another_process_of_the_same_number_is_not_taken_for_the_server(
    open_phase: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    phase = open_phase()
    folder = tmp_path / str(phase.connection.info.backend_pid)
    folder.mkdir()
    (folder / "cmdline").write_bytes(b"postgres: postgres another_database [local] idle\0")
    monkeypatch.setattr(capacity, "PROCESSES", tmp_path)
    assert capacity.look(phase.connection, phase.params).free_disk.bytes is None


def test_a_role_that_may_not_know_the_folder_is_told_what_to_grant(articles: Connection, open_phase: Open) -> None:
    phase = open_phase()
    articles.execute("CREATE ROLE plain_reader")
    try:
        phase.connection.execute("SET ROLE plain_reader")
        found = capacity.look(phase.connection, phase.params).free_disk
    finally:
        phase.connection.execute("RESET ROLE")
        articles.execute("DROP ROLE plain_reader")
    assert str(found) == (
        "UNKNOWN: this role may not know data_directory; GRANT pg_read_all_settings, or state preflight.free_disk_gb"
    )


def test_a_disk_that_is_too_small_says_what_would_fill_it(open_phase: Open) -> None:
    figures = {"index_bytes": 320 * MB, "table_growth_bytes": 200 * MB, "staging_bytes": 96 * MB}
    phase = open_phase(preflight={"free_disk_gb": 0.5})
    assert str(_gate(phase, "disk_holds_it", wal_bytes=408 * MB, **figures)) == (
        'FAIL    preflight.disk_holds_it   "public"."articles"\n'
        "  found   free disk 512 MB, by preflight.free_disk_gb\n"
        "  needed  1.0 GB: index 320 MB, table 200 MB, staging 96 MB, WAL at one time 408 MB\n"
        "  danger  the disk fills half-way; without room for WAL the server stops, with all that it serves\n"
        "  do      free or add 512 MB; or index.storage: halfvec makes the index smaller, vector.type: halfvec all of"
        " it"
    )
    enough = open_phase(preflight={"free_disk_gb": 1.0})
    assert _gate(enough, "disk_holds_it", wal_bytes=408 * MB, **figures).verdict == "PASS"


def test_shared_memory_must_hold_the_whole_budget_of_a_parallel_build(open_phase: Open) -> None:
    phase = open_phase(preflight={"shared_memory_mb": 64})
    assert str(_gate(phase, "shared_memory_holds_build", workers=2)) == (
        "FAIL    preflight.shared_memory_holds_build   parallel build of the index\n"
        "  found   64 MB, by preflight.shared_memory_mb\n"
        "  needed  256 MB, for 2 workers and the leader together\n"
        "  danger  the build ends at once: could not resize shared memory segment: No space left on device\n"
        "  do      start the server's container with --shm-size=256m or more, or set index.parallel_workers: 0,"
        " which needs no shared memory"
    )
    alone = _gate(phase, "shared_memory_holds_build", workers=0)
    assert (alone.verdict, alone.needed) == ("PASS", "none: no parallel worker is expected")
    assert "preflight.shared_memory_holds_build" not in _names(open_phase(index={"method": "ivfflat"}))


def test_a_parallel_build_really_takes_its_budget_as_one_segment(database: str) -> None:
    """What the gate rests on: the segment is as large as maintenance_work_mem, however few the rows."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "CREATE EXTENSION vector; CREATE TABLE v (e vector(3)) WITH (parallel_workers = 1);"
            "INSERT INTO v SELECT ARRAY[random(), random(), 1]::vector FROM generate_series(1, 20000);"
            "SET maintenance_work_mem = '96MB'; SET max_parallel_maintenance_workers = 1"
        )
        before, seen = _used(), list[int]()
        with psycopg.connect(database, autocommit=True) as other:
            builder = threading.Thread(
                target=connection.execute, args=("CREATE INDEX ON v USING hnsw (e vector_l2_ops)",)
            )
            builder.start()
            while builder.is_alive():
                seen.append(_used() - before)
                other.execute("SELECT pg_sleep(0.02)")
            builder.join()
        assert max(seen) >= 90 * MB


def _used() -> int:
    found = os.statvfs(capacity.SHARED_MEMORY)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.fixture
def slot(articles: Connection) -> Iterator[str]:
    articles.execute("SELECT pg_create_physical_replication_slot('reader', true)")
    yield "reader"
    articles.execute("SELECT pg_drop_replication_slot('reader')")


def test_a_slot_that_the_build_would_break_is_told_its_bound(
    articles: Connection, open_phase: Open, slot: str
) -> None:
    phase = open_phase()
    expects = replace(
        preflight.expected(preflight.facts(phase), phase.connection, phase.params), index_bytes=1024 * MB
    )
    slots = [{"name": slot, "active": True, "wal_status": "reserved", "kept_bytes": 100 * MB}]
    seen = replace(capacity.look(phase.connection, phase.params), slot_keeps_bytes=1024 * MB)
    assert str(capacity._slots_bear_the_build(phase.params, expects, seen, slots)) == (
        "FAIL    preflight.slots_bear_the_build   replication slots\n"
        "  found   reader (active, keeps 100 MB of WAL); max_slot_wal_keep_size 1.0 GB\n"
        "  needed  1.3 GB: 100 MB kept now, 256 MB of health.replica_lag_mb, and 1.0 GB of the build, which waits for"
        " no reader\n"
        "  danger  the server gives the slot up, and its replica or subscriber must be set up again\n"
        "  do      ALTER SYSTEM SET max_slot_wal_keep_size = '1380MB'; SELECT pg_reload_conf(); or let the reader"
        " catch up first"
    )
    unbounded = replace(seen, slot_keeps_bytes=-1)
    assert capacity._slots_bear_the_build(phase.params, expects, unbounded, slots).verdict == "PASS"


def test_without_a_bound_a_slot_may_hold_all_wal_on_the_disk(
    articles: Connection, open_phase: Open, slot: str
) -> None:
    phase = open_phase(preflight={"free_disk_gb": 100})
    wal = 200 * 1024 * MB
    held = _gate(phase, "disk_holds_it", wal_bytes=wal)
    assert (held.verdict, held.figures["wal_bytes"]) == ("FAIL", wal)
    assert "max_slot_wal_keep_size bounds what a slot may hold" in held.do
    articles.execute("SELECT pg_drop_replication_slot('reader')")
    between = _gate(phase, "disk_holds_it", wal_bytes=wal)
    row = articles.execute("SELECT pg_size_bytes(current_setting('max_wal_size'))").fetchone()
    assert (between.verdict, between.figures["wal_bytes"]) == ("PASS", row[0] if row else None)
    articles.execute("SELECT pg_create_physical_replication_slot('reader', true)")


def _params(make_params: MakeParams, **sections: dict[str, Any]) -> Forecast:
    return forecast.forecast(100_000, make_params(**sections), row_bytes=1000, table_bytes=113 * MB, indexes=3)


def test_a_trigram_index_is_most_of_what_an_update_costs(make_params: MakeParams) -> None:
    """Measured: 100 k rows of 1 kB text with a trigram index, 384 dimensions, key ranges: 30 kB and 480 µs a row."""
    table = {"row_bytes": 1100, "indexes": 2, "trigram_bytes": 1000.0, "table_bytes": 113 * MB}
    params = make_params(vector={"dimension": 384})
    found = forecast.forecast(100_000, params, **table)
    moved = found.wal_bytes - found.index_bytes - 100_000 * (384 * 4 + 8 + forecast.STAGING_WAL_A_ROW)
    assert moved / 100_000 == pytest.approx(30_000, rel=0.1)
    assert 1e6 * found.backfill_seconds / 100_000 == pytest.approx(480, rel=0.15)


def test_inverted_indexes_are_told_apart(articles: Connection, open_phase: Open) -> None:
    phase = open_phase()
    found = preflight.facts(phase)
    text = (found.text_bytes or 0) / found.rows
    assert preflight._trigram_bytes(found, phase.connection, phase.params) == pytest.approx(1.15 * text)
    articles.execute("DROP INDEX articles_trgm")
    assert preflight._trigram_bytes(found, phase.connection, phase.params) == pytest.approx(0.15 * text)


def test_a_table_beside_costs_no_rewrite_of_the_rows(make_params: MakeParams) -> None:
    column = _params(make_params)
    beside = _params(make_params, vector={"layout": "side_table"})
    assert beside.table_growth_bytes == column.staging_bytes and beside.staging_bytes == 0
    rows = 100_000
    staged = rows * (forecast.vector_bytes(8, "vector") + forecast.STAGING_WAL_A_ROW)
    assert beside.wal_bytes == staged + beside.index_bytes < column.wal_bytes / 3
    assert beside.backfill_seconds < column.backfill_seconds / 50


@pytest.mark.parametrize(
    ("megabytes", "memory_mb", "most", "workers"),
    [(7, 256, 2, 0), (8, 256, 2, 1), (24, 256, 4, 2), (72, 256, 8, 3), (10_000, 64, 8, 1), (10_000, 256, 2, 2)],
)
def test_workers_of_a_build_follow_postgresqls_rule(megabytes: int, memory_mb: int, most: int, workers: int) -> None:
    assert forecast.build_workers(megabytes * MB, memory_mb, most) == workers


# Measured: 100 k rows, 384 dimensions, on the machine that the constants are of.
@pytest.mark.parametrize(
    ("index", "workers", "seconds"), [({}, 0, 27.8), ({}, 1, 15.8), ({"ef_construction": 128}, 0, 56)]
)
def test_times_agree_with_the_measurements_they_come_from(
    make_params: MakeParams, index: dict[str, Any], workers: int, seconds: float
) -> None:
    params = make_params(index=index, vector={"dimension": 384})
    assert forecast.build_seconds(100_000, params, workers, None) == pytest.approx(seconds, rel=0.05)


def test_a_plan_beside_max_wal_size_says_how_many_checkpoints_it_forces(open_phase: Open) -> None:
    phase = open_phase()
    shown = replace(
        preflight.expected(preflight.facts(phase), phase.connection, phase.params),
        wal_bytes=9 * 1024 * MB,
        max_wal_bytes=1024 * MB,
    )
    assert "9, by max_wal_size 1.0 GB" in str(shown)


def test_each_node_holds_its_share_of_the_plan_and_one_that_is_silent_is_unknown(
    open_phase: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = open_phase()
    nodes = [
        node_capacity.Node(name, shards=16, heap_bytes=heap, memory_bytes=64 * MB, free_disk_bytes=500 * MB,
                           max_wal_bytes=100 * MB, at_once=4)
        for name, heap in (("one:5432", 300 * MB), ("two:5432", 100 * MB))
    ]  # fmt: skip
    silent = {"three:5432": "failed to connect to three:5432"}
    monkeypatch.setattr(node_capacity, "look", lambda *_: (nodes, silent))
    expects = replace(
        preflight.expected(preflight.facts(phase), phase.connection, phase.params),
        index_bytes=320 * MB, table_growth_bytes=200 * MB, staging_bytes=80 * MB, wal_bytes=400 * MB,
        build_memory_bytes=48 * MB,
    )  # fmt: skip
    gates = {g.subject: g for g in node_capacity.gates(phase.connection, phase.params, expects)}
    # Three quarters of 600 MB, and WAL up to max_wal_size; of the other a quarter of 600 and of 400 MB.
    assert {name: g.verdict for name, g in gates.items()} == {
        "three:5432": "UNKNOWN", "one:5432": "FAIL", "two:5432": "PASS"
    }  # fmt: skip
    assert gates["one:5432"].figures["wanted_bytes"] == 550 * MB
    assert gates["two:5432"].figures["wanted_bytes"] == 250 * MB
    assert gates["one:5432"].figures["memory_bytes"] == 4 * 48 * MB
