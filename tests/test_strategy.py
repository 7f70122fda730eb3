"""The strategy follows the table's facts, and says why."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from runbook_lib.filling import strategy
from runbook_lib.filling.strategy import Choice, Relation
from runbook_lib.gates import BadInput
from runbook_lib.params import Params

# 6 rows of 1,170 bytes on each page, 384 dimensions: the table of the measurements, whose vectors go to TOAST.
TABLE = Relation("public.articles", 14_286, "heap", 100, 100_000, 2, ("gin",))
VECTOR = {"dimension": 384}


def test_a_row_that_moves_away_makes_room_for_the_others() -> None:
    assert strategy.forecast_hot_share(1100, 43, 100) == pytest.approx(6 / 7)
    assert strategy.forecast_hot_share(1100, 43, 50) == 1.0, "half a page is free from the start"
    assert strategy.forecast_hot_share(200, 1569, 100) < 0.15, "a vector inside the row needs the room of nine"
    assert strategy.forecast_hot_share(0, 43, 100) == 0.0


def test_a_long_vector_leaves_only_a_pointer(make_params: Callable[..., Params]) -> None:
    assert strategy.grown_by(make_params(vector=VECTOR), 1100) == 25 + 18
    assert strategy.grown_by(make_params(vector=VECTOR), 200) == 25 + 8 + 4 * 384


def test_the_measured_table_is_gone_through_page_by_page(make_params: Callable[..., Params]) -> None:
    assert strategy.pick(make_params(vector=VECTOR), 180000, [TABLE], reads_ranges=True) == Choice(
        "page_interleaved",
        "83% of the updates are forecast to stay on their page and touch no index, and the table has 2 indexes,"
        " gin among them",
        pytest.approx(5 / 6),
    )


@pytest.mark.parametrize(
    ("server", "table", "reason"),
    [
        (130022, TABLE, "PostgreSQL 13.22 cannot read a range of blocks; 14 and newer can"),
        (180000, replace(TABLE, indexes=1), "the table has no index but its key's, so a row that moves costs little"),
        (180000, replace(TABLE, rows=0), "nothing is known about the table's rows; ANALYZE would tell"),
        (
            180000,
            replace(TABLE, rows=500_000),
            "rows of 234 bytes leave no room: only 12% of the updates are forecast to stay on their page and touch"
            " no index",
        ),
    ],
)
def test_key_ranges_where_pages_do_not_pay(
    make_params: Callable[..., Params], server: int, table: Relation, reason: str
) -> None:
    choice = strategy.pick(make_params(vector=VECTOR), server, [table], reads_ranges=True)
    assert (choice.strategy, choice.reason) == ("key_ranges", reason)


def test_no_ordinary_table_and_no_range_scan(make_params: Callable[..., Params]) -> None:
    p = make_params(vector=VECTOR)
    assert "no ordinary table" in strategy.pick(p, 180000, [], reads_ranges=True).reason
    assert "the planner does not read public.articles (heap)" in (
        strategy.pick(p, 180000, [TABLE], reads_ranges=False).reason
    )


def test_what_is_asked_for_is_done_or_refused(make_params: Callable[..., Params]) -> None:
    p = make_params(vector=VECTOR, backfill={"strategy": "key_ranges"})
    assert strategy.pick(p, 180000, [TABLE], reads_ranges=True).strategy == "key_ranges"
    p = make_params(vector=VECTOR, backfill={"strategy": "page_interleaved"})
    with pytest.raises(BadInput) as refused:
        strategy.pick(p, 130022, [TABLE], reads_ranges=False)
    assert str(refused.value) == (
        "\nFAIL    backfill.strategy_is_possible   backfill.strategy\n"
        "  found   page_interleaved\n"
        "  needed  a server and a table that are read by ranges of blocks\n"
        "  danger  PostgreSQL 13.22 cannot read a range of blocks; 14 and newer can\n"
        "  do      set backfill.strategy: auto"
    )
