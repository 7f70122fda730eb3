"""The decision between column and side table, from the table's own update rate."""

from collections.abc import Callable
from typing import Any

import psycopg

from runbook_lib.backfill import layout
from runbook_lib.core.phase import Phase


def test_a_table_of_many_dear_updates_wants_its_vectors_beside() -> None:
    assert layout.core_share(1000, "column") == 0.73
    assert layout.advice(1000) == (
        "side_table: in the column, updates that are not HOT would take 73.0% of a core more than today"
    )
    assert layout.advice(1).startswith("column: ")


def test_both_layouts_stand_side_by_side(open_phase: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    articles.execute("UPDATE articles SET views = views + 1")
    shown = str(layout.compare(open_phase("30_expand_schema")))
    for part in ("column", "side_table", "830 µs, today 100 µs", "108 µs, today 100 µs", "1.13 ×", "✔"):
        assert part in shown
