"""The forecast's formulas, against measured figures and against real builds."""

import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.indexes import forecast
from runbook_lib.params import Params

LITTLE_MEMORY_MB = 16


# Measured on PostgreSQL 18.6 with pgvector 0.8.6.
@pytest.mark.parametrize(
    ("dimension", "kind", "measured"),
    [(64, "vector", 570), (384, "vector", 2048), (384, "halfvec", 1171), (1536, "vector", 8193)],
)
def test_index_bytes_agree_with_measured_ones(dimension: int, kind: str, measured: int) -> None:
    assert forecast.hnsw_index_bytes_per_row(16, dimension, kind) == pytest.approx(measured, rel=0.02)


def test_build_bytes_at_m_16_are_about_682_and_the_vector() -> None:
    for dimension in (64, 384, 1024):
        assert forecast.hnsw_build_bytes_per_row(16, dimension) == pytest.approx(682 + 4 * dimension, rel=0.002)
    assert forecast.hnsw_build_bytes_per_row(16, 384, "halfvec") == pytest.approx(682 + 768, rel=0.002)


def test_build_bytes_by_hand_for_small_m() -> None:
    # m = 2: every node is on one upper layer on average. 128 + 16 + (8 + 64) + (8 + 32) + (8 + 4·8)
    assert forecast.hnsw_build_bytes_per_row(2, 8) == 128 + 16 + 72 + 40 + 40


def test_a_vector_that_leaves_no_room_for_its_neighbours_takes_two_pages() -> None:
    assert forecast.hnsw_index_bytes_per_row(16, 2000) == 2 * forecast.PAGE


def test_a_parallel_build_may_fill_four_megabytes_less() -> None:
    assert forecast.hnsw_build_budget_bytes(256, 0) - forecast.hnsw_build_budget_bytes(256, 2) == 4 * forecast.MB


@pytest.mark.parametrize(
    ("rows", "lists", "probes"),
    [(0, 1, 1), (5_000, 5, 2), (1_000_000, 1000, 32), (4_000_000, 2000, 45), (2_000_000_000, 32768, 181)],
)
def test_lists_and_probes_follow_pgvectors_rule(rows: int, lists: int, probes: int) -> None:
    assert (forecast.lists_rule(rows), forecast.probes_rule(forecast.lists_rule(rows))) == (lists, probes)


def test_wal_of_a_row_agrees_with_measured_figures() -> None:
    assert forecast.backfill_wal_bytes(1, 1024, "vector", 100, 1, 0) == pytest.approx(4700, rel=0.1)
    assert forecast.vector_bytes(384, "vector") + forecast.STAGING_WAL_A_ROW == pytest.approx(1600, rel=0.1)


@pytest.mark.parametrize(("dimension", "inline"), [(384, True), (490, True), (510, False), (1024, False)])
def test_vectors_move_to_toast_where_measured(dimension: int, inline: bool) -> None:
    stored = forecast.stored_bytes_per_row(dimension, "vector", 0)
    assert (stored == forecast.vector_bytes(dimension, "vector")) == inline


def test_a_forecast_scales_with_rows_and_names_lists_only_for_ivfflat(make_params: Callable[..., Params]) -> None:
    small, large = (forecast.forecast(n, make_params(), row_bytes=100) for n in (100_000, 1_000_000))
    assert large.table_growth_bytes == 10 * small.table_growth_bytes
    assert large.index_bytes == pytest.approx(10 * small.index_bytes, rel=0.01)
    assert small.lists is None and "lists" not in str(small)
    ivfflat = forecast.forecast(100_000, make_params(index={"method": "ivfflat"}), row_bytes=100)
    assert (ivfflat.lists, ivfflat.probes) == (100, 10)
    assert ivfflat.index_bytes < small.index_bytes and ivfflat.build_memory_bytes < small.build_memory_bytes
    assert "lists" in ivfflat._repr_html_()


def _random_vectors(connection: psycopg.Connection[Any], rows: int, dimension: int) -> None:
    connection.execute("CREATE EXTENSION vector; SELECT setseed(0.5)")
    connection.execute(psycopg.sql.SQL("CREATE TABLE v (e vector({}))").format(psycopg.sql.Literal(dimension)))
    connection.execute(
        # The reference to i makes the inner query run again for each row.
        "INSERT INTO v SELECT (SELECT array_agg(random())::real[]::vector FROM generate_series(1, %s) WHERE i > 0)"
        " FROM generate_series(1, %s) i",
        [dimension, rows],
    )


def _index_bytes(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT pg_relation_size('ix')").fetchone()
    assert row is not None
    return int(row[0])


def test_a_real_build_runs_out_of_memory_where_forecast(database: str) -> None:
    dimension = 1000
    a_row = forecast.hnsw_build_bytes_per_row(16, dimension)
    expected = forecast.hnsw_build_budget_bytes(LITTLE_MEMORY_MB, 0) / a_row
    notices: list[str] = []
    with psycopg.connect(database, autocommit=True) as connection:
        _random_vectors(connection, round(expected * 1.05), dimension)
        connection.add_notice_handler(lambda d: notices.append(d.message_primary or ""))
        connection.execute("SET max_parallel_maintenance_workers = 0")
        connection.execute(f"SET maintenance_work_mem = '{LITTLE_MEMORY_MB}MB'")
        connection.execute("CREATE INDEX ix ON v USING hnsw (e vector_l2_ops) WITH (ef_construction = 32)")
    (notice,) = [n for n in notices if "no longer fits" in n]
    tuples = re.search(r"after (\d+) tuples", notice)
    assert tuples and int(tuples[1]) == pytest.approx(expected, rel=0.03)


def test_real_indexes_have_the_size_forecast(database: str) -> None:
    rows, dimension, lists = 3000, 200, 10
    with psycopg.connect(database, autocommit=True) as connection:
        _random_vectors(connection, rows, dimension)
        connection.execute("CREATE INDEX ix ON v USING hnsw (e vector_l2_ops)")
        hnsw = _index_bytes(connection)
        connection.execute("DROP INDEX ix; CREATE INDEX ix ON v USING ivfflat (e vector_l2_ops) WITH (lists = 10)")
        ivfflat = _index_bytes(connection)
    assert forecast.hnsw_index_bytes_per_row(16, dimension) * rows == pytest.approx(hnsw, rel=0.05)
    assert forecast.ivfflat_index_bytes(rows, dimension, "vector", lists) == pytest.approx(ivfflat, rel=0.05)
