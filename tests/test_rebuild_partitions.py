"""Operate 40 on a partitioned table: a partition at a time, stopped and gone on with, and taken back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.core.gates import GateFailed
from runbook_lib.core.phase import MIGRATE, Phase, open_phase
from runbook_lib.operate import rebuild_index, rebuild_partitions
from tests import partitioned
from tests.conftest import write_params
from tests.stepping import step, step_all
from tests.test_partitions import SECTIONS

LEAVES = ("articles_acme", "articles_rest", "articles_bolt_0", "articles_bolt_1")


@pytest.fixture
def migrated(articles: psycopg.Connection[Any], tmp_path: Path) -> Callable[..., Path]:
    """A partitioned table whose index is built; returns the params file, written anew with other options."""
    articles.execute("DROP TABLE articles")
    partitioned.create_articles(articles, "list")
    step_all("migrate", MIGRATE[:7], write_params(tmp_path, **SECTIONS))
    return lambda **index: write_params(tmp_path, **SECTIONS, index=index)


def _opened(path: Path, run_id: str) -> Phase:
    phase = open_phase("operate/rebuild_index", str(path), run_id, True)
    phase.require()
    return phase


def _close(phase: Phase) -> None:
    phase.end("was ended by the test", "nothing")


def _options(articles: psycopg.Connection[Any]) -> dict[str, list[str]]:
    found = articles.execute("SELECT relname, reloptions FROM pg_class WHERE relname LIKE '%hnsw' AND relkind = 'i'")
    return {name.removesuffix("_embedding_hnsw"): options for name, options in found}


def test_the_notebook_builds_each_partition_anew_with_other_options(
    migrated: Callable[..., Path], articles: psycopg.Connection[Any]
) -> None:
    before = dict(articles.execute("SELECT relname, oid FROM pg_class WHERE relname LIKE '%hnsw'").fetchall())
    step("operate/rebuild_index", migrated(m=8, ef_construction=32))
    after = dict(articles.execute("SELECT relname, oid FROM pg_class WHERE relname LIKE '%hnsw'").fetchall())
    assert before.keys() == after.keys()
    assert _options(articles) == {leaf: ["m=8", "ef_construction=32"] for leaf in LEAVES}
    assert {name for name in before if before[name] != after[name]} == {f"{leaf}_embedding_hnsw" for leaf in LEAVES}
    state = partitioned.index_state(articles)
    assert state["articles_embedding_hnsw"] == (True, False) and len(state) == 6


def test_stopped_between_two_partitions_it_goes_on_in_another_run_and_is_taken_back(
    migrated: Callable[..., Path], articles: psycopg.Connection[Any]
) -> None:
    phase = _opened(migrated(storage="halfvec"), "refused")
    refused = [g for g in rebuild_index.check(phase) if g.verdict != "PASS"]
    assert [g.name for g in refused] == ["index.has_the_right_operator_class"]
    assert refused[0].do == "run undo/index, and 60_build_index again"
    _close(phase)
    path = migrated(m=8, ef_construction=32)
    phase = _opened(path, "first")
    assert [s.name.split(".")[1] for s in rebuild_index.plan(phase)] == ["set_options", "reindex"] * 4
    with partitioned.killed_after(rebuild_partitions, builds=2):
        rebuild_index.apply(phase)
    assert str(rebuild_index.verify_new(phase)) == (
        "FAIL    rebuild.every_partition_is_new   articles_embedding_hnsw\n"
        "  found   2 of 4 partitions\n"
        "  needed  all of them\n"
        "  danger  partitions whose index is from before keep its options and its faults\n"
        "  do      run operate/rebuild_index again with execute: true; it goes on with the partitions that are left"
    )
    with pytest.raises(GateFailed):
        phase.prove(rebuild_index.verify_new)
    _close(phase)
    # What a REINDEX CONCURRENTLY leaves when it is cancelled.
    articles.execute(
        "CREATE INDEX articles_rest_embedding_hnsw_ccnew ON articles_rest USING hnsw (embedding vector_l2_ops)"
    )
    articles.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'articles_rest_embedding_hnsw_ccnew'::regclass"
    )

    phase = _opened(path, "second")
    names = [s.name.split(".")[1] for s in rebuild_index.plan(phase)]
    # The options of the third had been set when its build was stopped.
    assert names == ["drop", "reindex", "set_options", "reindex"]
    rebuild_index.apply(phase)
    gates = rebuild_index.verify_new(phase)
    assert gates.passed and [g.name for g in gates][-1] == "rebuild.new_index_finds_as_much"
    rebuild_index.swap(phase)
    assert rebuild_index.verify(phase).passed
    assert rebuild_index.plan(phase).statements == ()
    rebuild_index.undo(phase)
    assert rebuild_index.verify_undone(phase).passed
    assert _options(articles) == {leaf: ["m=16", "ef_construction=64"] for leaf in LEAVES}
    assert rebuild_index.undo_plan(phase).statements == ()
    _close(phase)
