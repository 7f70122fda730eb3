"""The strategy follows the table's facts, and says why; the first ranges show whether it pays."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psycopg
import pytest

from runbook_lib.backfill import batch_ranges, batch_strategy, throttle, update_effects, workers
from runbook_lib.backfill.batch_strategy import Relation, StrategyChoice
from runbook_lib.backfill.update_effects import Effects
from runbook_lib.cli import demo
from runbook_lib.core.db import Connection
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, expand_schema, extension, load_embeddings, trials
from runbook_lib.params import Params
from tests.small_runs import wait_until

TABLE = Relation("public.articles", 14_286, "heap", 2, ("gin",))
TRIED = Effects(rows=60, hot=4)
VECTOR = {"dimension": 384}
Open = Callable[..., Phase]


def test_a_table_with_indexes_is_gone_through_page_by_page(make_params: Callable[..., Params]) -> None:
    p = make_params(vector=VECTOR)
    assert batch_strategy.pick(p, 180000, [TABLE], reads_ranges=True, tried=TRIED) == StrategyChoice(
        "page_interleaved",
        "the table has 2 indexes, gin among them; 60 rows tried, 4 of them without leaving their page (HOT), as the"
        " pages are now; the first ranges show how many stay",
    )
    assert batch_strategy.pick(p, 180000, [TABLE], reads_ranges=True) == StrategyChoice(
        "page_interleaved", "the table has 2 indexes, gin among them; the first ranges show how many stay"
    )


@pytest.mark.parametrize(
    ("server", "indexes", "reads_ranges", "reason"),
    [
        (130022, 2, False, "PostgreSQL 13.22 cannot read a range of blocks; 14 and newer can"),
        (180000, 1, True, "the table has no index but its key's, so a row that moves costs little"),
    ],
)
def test_key_ranges_where_pages_do_not_pay(
    make_params: Callable[..., Params], server: int, indexes: int, reads_ranges: bool, reason: str
) -> None:
    table = Relation("public.articles", 14_286, "heap", indexes, ())
    choice = batch_strategy.pick(make_params(vector=VECTOR), server, [table], reads_ranges=reads_ranges, tried=TRIED)
    assert (choice.strategy, choice.reason) == ("key_ranges", reason)


def test_no_ordinary_table_and_no_range_scan(make_params: Callable[..., Params]) -> None:
    p = make_params(vector=VECTOR)
    assert "no ordinary table" in batch_strategy.pick(p, 180000, [], reads_ranges=True).reason
    unread = batch_strategy.pick(p, 180000, [TABLE], reads_ranges=False)
    assert "the planner does not read public.articles (heap)" in unread.reason


def test_what_is_asked_for_is_done_or_refused(make_params: Callable[..., Params]) -> None:
    p = make_params(vector=VECTOR, backfill={"strategy": "key_ranges"})
    assert batch_strategy.pick(p, 180000, [TABLE], reads_ranges=True).strategy == "key_ranges"
    p = make_params(vector=VECTOR, backfill={"strategy": "page_interleaved"})
    with pytest.raises(BadInput) as refused:
        batch_strategy.pick(p, 130022, [TABLE], reads_ranges=False)
    assert str(refused.value) == (
        "\nFAIL    backfill.strategy_is_possible   backfill.strategy\n"
        "  found   page_interleaved\n"
        "  needed  a server and a table that are read by ranges of blocks\n"
        "  danger  PostgreSQL 13.22 cannot read a range of blocks; 14 and newer can\n"
        "  do      set backfill.strategy: auto"
    )


ROWS = 2500
AT_WORK = "SELECT FROM pg_stat_activity WHERE application_name LIKE '%worker%' AND datname = current_database()"
# Real lengths of a text spread like this about their mean.
SPREAD = 0.4


def vectors(dimension: int) -> Callable[[list[str]], np.ndarray]:
    draw = np.random.default_rng(7)
    return lambda texts: draw.standard_normal((len(texts), dimension)).astype(np.float32)


embed_384 = vectors(384)


@pytest.fixture(scope="module")
def prose() -> str:
    """What real articles say, one after the other."""
    return " ".join(demo._article(w).body for w in demo._weaknesses())


@pytest.fixture
def table(articles: psycopg.Connection[Any], prose: str) -> Iterator[Callable[..., psycopg.Connection[Any]]]:
    """Makes the target with texts of a length, real ones, with an index that every moved row has to enter."""

    def make(mean: int, *, fillfactor: int = 100) -> psycopg.Connection[Any]:
        articles.execute("DROP TABLE articles")
        articles.execute(
            "CREATE TABLE articles (id bigint PRIMARY KEY, title text, body text, status text NOT NULL DEFAULT"
            " 'Stable', views int NOT NULL DEFAULT 0, tsv tsvector)"
            f" WITH (fillfactor = {fillfactor}, autovacuum_enabled = off)"
        )
        draw, at = random.Random(3), 0
        with articles.cursor().copy("COPY articles (id, title, body) FROM STDIN") as copy:
            for key in range(ROWS):
                length = max(30, int(draw.lognormvariate(0, SPREAD) * mean))
                at = (at + length) % (len(prose) - 20 * mean)
                copy.write_row((key, f"Title of {key}", prose[at : at + length]))
        articles.execute("CREATE INDEX ON articles USING gin (tsv)")
        articles.execute("VACUUM ANALYZE articles")
        return articles

    yield make


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges so small that a table of a few pages has several, and a probe that they suffice for."""
    monkeypatch.setattr(batch_ranges, "FEWEST_BLOCKS_A_WINDOW", 4)
    monkeypatch.setattr(workers, "UPDATES_OF_THE_PROBE", 200)
    monkeypatch.setattr(throttle, "SECONDS_BETWEEN_LOOKS", 0.01)


@pytest.fixture
def counted(articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, float]]:
    """How many rows the workers updated, by the server, and the share of them that was HOT.

    The server also counts what the trial of the UPDATE rolled back: that is read before the workers start.
    """
    choose, before = batch_strategy.choose, list[int]()

    def read() -> tuple[int, int]:
        found = articles.execute(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'articles'"
        ).fetchone()
        assert found is not None
        return found[0], found[1]

    def choose_after_the_trial(connection: Connection, *args: Any) -> StrategyChoice:
        connection.execute("SELECT pg_stat_force_next_flush()")
        before[:] = read()
        return choose(connection, *args)

    def by_the_workers() -> tuple[int, float]:
        # A session's last updates are counted when it ends.
        wait_until(lambda: articles.execute(AT_WORK).fetchone() is None, 10)
        updated, hot = (now - was for now, was in zip(read(), before, strict=True))
        return updated, hot / updated

    monkeypatch.setattr(batch_strategy, "choose", choose_after_the_trial)
    return by_the_workers


@pytest.mark.parametrize("worker_count", [1, 2])
def test_where_rows_stay_on_their_page_it_goes_page_by_page_to_the_end(
    table: Callable[..., psycopg.Connection[Any]],
    open_phase: Open,
    early: None,
    counted: Callable[[], tuple[int, float]],
    worker_count: int,
) -> None:
    table(1000)
    noted = _filled(open_phase, workers=worker_count)
    assert noted["strategy"] == "page_interleaved" and "HOT" in noted["reason"]
    assert (noted["remark"], noted["rows"]) == ("", ROWS)
    assert counted() == (ROWS, pytest.approx(noted["hot_share"], abs=0.0005))
    assert noted["hot_share"] > batch_strategy.LEAST_HOT_SHARE


def test_where_few_stay_the_first_ranges_show_it_and_it_goes_on_by_whole_ranges(
    table: Callable[..., psycopg.Connection[Any]],
    open_phase: Open,
    early: None,
    counted: Callable[[], tuple[int, float]],
) -> None:
    table(150)
    noted = _filled(open_phase, batch_rows=20, most_batch_rows=20)
    assert noted["remark"].startswith("only ") and noted["remark"].endswith("from here range by range")
    assert noted["hot_share"] < batch_strategy.LEAST_HOT_SHARE and noted["rows"] == ROWS
    assert counted() == (ROWS, pytest.approx(noted["hot_share"], abs=0.0005))


@pytest.mark.parametrize(("fillfactor", "stays"), [(100, False), (30, True)])
def test_the_trial_counts_the_rows_that_find_room_on_their_page(
    table: Callable[..., psycopg.Connection[Any]],
    open_phase: Open,
    monkeypatch: pytest.MonkeyPatch,
    fillfactor: int,
    stays: bool,
) -> None:
    monkeypatch.setattr(update_effects, "BUDGET_S", 10.0)
    table(400, fillfactor=fillfactor)
    phase = open_phase("50_backfill", vector=VECTOR, embeddings=SOURCE)
    for module in (extension, expand_schema):
        module.apply(phase)
    gates, effects = trials.of_update(phase.connection, phase.params)
    assert effects is not None and effects.rows >= 60
    assert (effects.hot > 0.5 * effects.rows) if stays else (effects.hot < 0.1 * effects.rows)
    assert f"{effects.hot} of them without leaving their page (HOT), as the pages are now" in gates[0].found
    assert gates[0].figures["hot"] == effects.hot


SOURCE = {"source": "callable", "callable": "tests.test_batch_strategy:embed_384"}


def _filled(open_phase: Open, **how: Any) -> dict[str, Any]:
    phase = open_phase("50_backfill", vector=VECTOR, embeddings=SOURCE, backfill=how)
    for module in (extension, expand_schema, load_embeddings, backfill):
        module.apply(phase)
    noted = phase.ledger.latest("backfill")
    assert noted is not None
    return dict(noted)
