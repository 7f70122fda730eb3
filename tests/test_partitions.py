"""A partitioned target: the whole way there and back, and the index put together partition by partition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib import compare
from runbook_lib.phase import MIGRATE, UNDO
from tests import partitioned
from tests.conftest import write_params
from tests.partitioned import Kind
from tests.stepping import step_all
from tests.test_migration import dump

# The toy model is worse than LIKE on these queries, and 80_shadow would say so.
SECTIONS: dict[str, dict[str, Any]] = {
    "cut_over": {"calls_per_step": 20, "share_steps_percent": [100], "largest_relevance_loss": 1.0},
    "tune": {"ef_search": [20, 60], "target_recall": 0.9},
    "target": {"filters": ["tenant"]},
}
OWN_COLUMNS = "SELECT tableoid::regclass::text, id, tenant, title, body, status, views, tsv FROM articles ORDER BY id"


@pytest.fixture
def empty(database: str) -> Any:
    """A superuser's connection to a database without tables."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize("kind", ["list", "range", "hash"])
def test_there_and_back(
    empty: psycopg.Connection[Any], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    # Two hundred rows are searched within milliseconds by any way: what is faster is chance here.
    monkeypatch.setattr(compare, "FAST_ENOUGH_MS", 1000)
    partitioned.create_articles(empty, kind)
    before, own_rows = dump(database), empty.execute(OWN_COLUMNS).fetchall()
    path = write_params(tmp_path, **SECTIONS)

    step_all("migrate", MIGRATE, path)
    assert empty.execute("SELECT route, share_percent FROM runbook.route").fetchall() == [("vector", 100)]
    state = partitioned.index_state(empty)
    assert state["articles_embedding_hnsw"] == (True, False), "the index of the parent is valid, and part of no other"
    assert set(state.values()) <= {(True, False), (True, True)}
    assert len(state) == len(empty.execute("SELECT 1 FROM pg_partition_tree('articles')").fetchall())
    assert empty.execute(OWN_COLUMNS).fetchall() == own_rows

    step_all("undo", UNDO, path)
    assert dump(database) == before
    assert empty.execute(OWN_COLUMNS).fetchall() == own_rows
