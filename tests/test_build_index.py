"""Phase 60: built, left over, built again, and gone."""

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.core import db
from runbook_lib.core.names import names
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import build_index

Open = Callable[..., Phase]


def test_it_is_valid_has_its_class_and_finds_known_rows(filled: Callable[..., Phase]) -> None:
    phase = filled()
    build_index.apply(phase)
    gates = build_index.verify(phase)
    assert gates.passed
    assert [g.name for g in gates] == [
        "index.is_valid",
        "index.has_the_right_operator_class",
        "index.was_built_without_warning",
        "index.finds_known_rows",
    ]
    assert build_index.plan(phase).statements == (), "built once, nothing is left to do"


def test_known_rows_of_a_large_table_come_from_a_sample_of_its_pages(
    filled: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = filled()
    build_index.apply(phase)
    n = names(phase.params) | {"vectors": names(phase.params)["table"]}
    pick = "SELECT id FROM articles {} WHERE embedding IS NOT NULL ORDER BY embedding_hash LIMIT 5"

    def picked(sampled: str) -> list[Any]:
        return [row[0] for row in articles.execute(pick.format(sampled)).fetchall()]  # type: ignore[arg-type]

    articles.execute("UPDATE pg_class SET reltuples = 2000 WHERE oid = 'articles'::regclass")
    quarter = 100 * build_index.SAMPLED_FOR_ONE * 5 / 2000
    found = [row["key"] for row in build_index._known_rows(phase, n, 5)]
    assert found == picked(f"TABLESAMPLE SYSTEM ({quarter}) REPEATABLE (1)") != picked("")
    articles.execute("UPDATE pg_class SET reltuples = 1e9 WHERE oid = 'articles'::regclass")
    assert [row["key"] for row in build_index._known_rows(phase, n, 5)] == picked(""), "too few in the sample"


@pytest.mark.parametrize(
    ("vector", "options"),
    [
        ({"type": "halfvec"}, {}),
        ({"distance": "l2"}, {}),
        ({"distance": "inner_product"}, {"m": 8, "ef_construction": 20}),
        ({}, {"method": "ivfflat", "lists": 4}),
    ],
)
def test_types_distances_and_methods(
    filled: Callable[..., Phase], vector: dict[str, Any], options: dict[str, Any]
) -> None:
    phase = filled(vector=vector, index=options)
    build_index.apply(phase)
    gates = {g.name: g.verdict for g in build_index.verify(phase)}
    assert gates["index.has_the_right_operator_class"] == "PASS"
    assert gates["index.is_valid"] == "PASS"


def test_no_index_says_so(filled: Callable[..., Phase]) -> None:
    assert str(build_index.verify(filled())) == (
        "FAIL    index.is_valid   articles_embedding_hnsw on public.articles\n"
        "  found   no such index\n"
        "  needed  valid\n"
        "  danger  every search reads the whole table\n"
        "  do      run 60_build_index with execute: true"
    )


def test_what_an_interrupted_build_left_is_named_dropped_and_built_anew(
    filled: Callable[..., Phase], database: str, articles: psycopg.Connection[Any]
) -> None:
    phase = filled()
    with psycopg.connect(database) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM articles")
        failed: list[BaseException] = []

        def build() -> None:
            try:
                build_index.apply(phase)
            except psycopg.errors.QueryCanceled as error:
                failed.append(error)

        builder = threading.Thread(target=build)
        builder.start()
        cancelled = False
        for _ in range(100):
            time.sleep(0.1)
            row = articles.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_progress_create_index WHERE phase LIKE '%old snapshots%'"
            ).fetchone()
            if row:
                cancelled = True
                break
        builder.join(30)
        assert cancelled and failed
    assert str(build_index.verify(phase)) == (
        "FAIL    index.is_valid   articles_embedding_hnsw on public.articles\n"
        "  found   invalid (an earlier concurrent build did not finish)\n"
        "  needed  valid\n"
        "  danger  no query can use it, yet every write still pays for it\n"
        "  do      run 60_build_index again with execute: true; it drops this index concurrently and builds anew"
    )
    assert [s.name for s in build_index.plan(phase)] == ["index.drop", "index.create_hnsw"]
    build_index.apply(phase)
    assert build_index.verify(phase).passed


def test_too_little_memory_fails_the_gate(filled: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = filled()
    build_index.apply(phase)
    phase.note("index", {"notices": ["hnsw graph no longer fits into maintenance_work_mem after 12 tuples"]})
    assert [g.name for g in build_index.verify(phase).failed] == ["index.was_built_without_warning"]


def test_an_index_of_another_class_fails_the_gate(
    filled: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = filled()
    articles.execute("CREATE INDEX articles_embedding_hnsw ON articles USING hnsw (embedding vector_l2_ops)")
    wrong = build_index.verify(phase).failed[0]
    assert (wrong.name, wrong.found) == (
        "index.has_the_right_operator_class",
        "hnsw with vector_l2_ops on embedding",
    )


def test_undo_drops_it_and_twice_does_nothing(filled: Callable[..., Phase]) -> None:
    phase = filled()
    build_index.apply(phase)
    build_index.undo(phase)
    assert build_index.verify_undone(phase).passed
    assert build_index.undo_plan(phase).statements == ()


def test_old_transactions_are_shown_before_the_build(filled: Callable[..., Phase], database: str) -> None:
    phase = filled()
    with psycopg.connect(database, application_name="a long report") as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM articles")
        time.sleep(1.2)
        assert "a long report" in str(build_index.in_the_way(phase))


def test_the_builds_settings_stay_in_its_own_session(filled: Callable[..., Phase]) -> None:
    phase = filled()
    build_index.apply(phase)
    with db.connect(phase.params, "another") as other:
        assert other.execute("SHOW maintenance_work_mem").fetchone() == {"maintenance_work_mem": "64MB"}
    assert phase.connection.execute("SHOW lock_timeout").fetchone() == {"lock_timeout": "100ms"}
