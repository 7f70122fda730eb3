"""The strategy follows the table's facts, and says why."""

from collections.abc import Callable

import pytest

from runbook_lib.backfill import batch_strategy
from runbook_lib.backfill.batch_strategy import Choice, Relation
from runbook_lib.backfill.hot_forecast import Sampled
from runbook_lib.core.gates import BadInput
from runbook_lib.params import Params

# The table of the measurements, of whose updates five in six stay on their page.
TABLE = Relation("public.articles", 14_286, "heap", 2, ("gin",))
SAMPLED = Sampled(rows=1400, row_bytes=1170, hot_share=5 / 6)
VECTOR = {"dimension": 384}


def test_the_measured_table_is_gone_through_page_by_page(make_params: Callable[..., Params]) -> None:
    assert batch_strategy.pick(make_params(vector=VECTOR), 180000, [TABLE], SAMPLED) == Choice(
        "page_interleaved",
        "83% of the updates are forecast to stay on their page and touch no index, and the table has 2 indexes,"
        " gin among them",
        pytest.approx(5 / 6),
    )


@pytest.mark.parametrize(
    ("server", "indexes", "sampled", "reason"),
    [
        (130022, 2, None, "PostgreSQL 13.22 cannot read a range of blocks; 14 and newer can"),
        (180000, 1, SAMPLED, "the table has no index but its key's, so a row that moves costs little"),
        (180000, 2, Sampled(0, 0.0, 0.0), "no row that wants a vector was found in the blocks looked at"),
        (
            180000,
            2,
            Sampled(7000, 234.0, 0.12),
            "rows of 234 bytes leave no room: only 12% of the updates are forecast to stay on their page and touch"
            " no index",
        ),
    ],
)
def test_key_ranges_where_pages_do_not_pay(
    make_params: Callable[..., Params], server: int, indexes: int, sampled: Sampled | None, reason: str
) -> None:
    table = Relation("public.articles", 14_286, "heap", indexes, ())
    choice = batch_strategy.pick(make_params(vector=VECTOR), server, [table], sampled)
    assert (choice.strategy, choice.reason) == ("key_ranges", reason)


def test_no_ordinary_table_and_no_range_scan(make_params: Callable[..., Params]) -> None:
    p = make_params(vector=VECTOR)
    assert "no ordinary table" in batch_strategy.pick(p, 180000, [], None).reason
    assert "the planner does not read public.articles (heap)" in batch_strategy.pick(p, 180000, [TABLE], None).reason


def test_what_is_asked_for_is_done_or_refused(make_params: Callable[..., Params]) -> None:
    p = make_params(vector=VECTOR, backfill={"strategy": "key_ranges"})
    assert batch_strategy.pick(p, 180000, [TABLE], SAMPLED).strategy == "key_ranges"
    p = make_params(vector=VECTOR, backfill={"strategy": "page_interleaved"})
    with pytest.raises(BadInput) as refused:
        batch_strategy.pick(p, 130022, [TABLE], None)
    assert str(refused.value) == (
        "\nFAIL    backfill.strategy_is_possible   backfill.strategy\n"
        "  found   page_interleaved\n"
        "  needed  a server and a table that are read by ranges of blocks\n"
        "  danger  PostgreSQL 13.22 cannot read a range of blocks; 14 and newer can\n"
        "  do      set backfill.strategy: auto"
    )
