"""The forecast of the updates that stay on their page, against what PostgreSQL counted of real backfills."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psycopg
import pytest

from runbook_lib.backfill import batch_strategy, hot_forecast, workers
from runbook_lib.backfill.hot_forecast import Row, Value
from runbook_lib.cli import demo
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, expand_schema, extension, load_embeddings
from runbook_lib.params import Params
from tests.opened import gates_passed

Open = Callable[..., Phase]
ROWS = 2500
WITHIN = 0.10
# Real lengths of a text spread like this about their mean.
SPREAD = 0.4


def vectors(dimension: int) -> Callable[[list[str]], np.ndarray]:
    draw = np.random.default_rng(7)
    return lambda texts: draw.standard_normal((len(texts), dimension)).astype(np.float32)


embed_384, embed_1536 = vectors(384), vectors(1536)


@pytest.fixture(scope="module")
def prose() -> str:
    """What real articles say, one after the other."""
    return " ".join(demo._article(w).body for w in demo._weaknesses())


@pytest.fixture
def table(articles: psycopg.Connection[Any], prose: str) -> Iterator[Callable[..., psycopg.Connection[Any]]]:
    """Makes the target with texts of a length, real ones, with an index that every moved row has to enter."""

    def make(mean: int, *, tsv: bool, fillfactor: int = 100) -> psycopg.Connection[Any]:
        made = "to_tsvector('english', coalesce(title, '') || ' ' || coalesce(body, ''))" if tsv else "NULL::tsvector"
        articles.execute("DROP TABLE articles")
        articles.execute(
            "CREATE TABLE articles (id bigint PRIMARY KEY, title text, body text, status text NOT NULL DEFAULT"
            f" 'Stable', views int NOT NULL DEFAULT 0, tsv tsvector GENERATED ALWAYS AS ({made}) STORED)"
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


CASES = [
    (300, False, 100, 384), (300, True, 100, 384), (1000, True, 100, 384), (2500, True, 100, 384),
    (300, True, 80, 384), (300, False, 50, 384), (1000, True, 100, 1536),
]  # fmt: skip


@pytest.mark.parametrize(("mean", "tsv", "fillfactor", "dimension"), CASES)
def test_the_forecast_is_what_the_server_counts(
    table: Callable[..., psycopg.Connection[Any]],
    open_phase: Open,
    monkeypatch: pytest.MonkeyPatch,
    mean: int,
    tsv: bool,
    fillfactor: int,
    dimension: int,
) -> None:
    connection = table(mean, tsv=tsv, fillfactor=fillfactor)
    phase = _loaded(open_phase, dimension, strategy="page_interleaved")
    # Otherwise it goes over to whole windows where little stays.
    monkeypatch.setattr(workers, "UPDATES_OF_THE_PROBE", 10 * ROWS)
    forecast = batch_strategy.choose(phase).hot_share
    backfill.apply(phase)
    assert forecast == pytest.approx(_counted(connection), abs=WITHIN)
    assert hot_forecast.look(phase, "public.articles", 10**6).rows == 0, "no row wants a vector any more"


def test_two_workers_tidy_each_others_pages_later_and_the_forecast_knows(
    table: Callable[..., psycopg.Connection[Any]], open_phase: Open
) -> None:
    table(1000, tsv=True)
    alone = _loaded(open_phase, 384, strategy="page_interleaved")
    beside = alone.params.model_copy(update={"backfill": alone.params.backfill.model_copy(update={"workers": 2})})
    alone_share = batch_strategy.choose(alone).hot_share
    assert batch_strategy.choose(
        gates_passed(Phase(alone.name, alone.run_id, True, beside, alone.connection, alone.ledger))
    ).hot_share < (alone_share - 0.1)


def test_where_little_stays_the_strategy_is_another(
    table: Callable[..., psycopg.Connection[Any]], open_phase: Open
) -> None:
    table(150, tsv=False)
    phase = _loaded(open_phase, 384)
    choice = batch_strategy.choose(phase)
    assert choice.strategy == "key_ranges" and choice.hot_share < batch_strategy.LEAST_HOT_SHARE
    assert choice.reason.startswith("rows of ") and "leave no room: only " in choice.reason
    assert batch_strategy.expected_hot_share(phase) == 0.0
    table(300, tsv=True)
    assert batch_strategy.expected_hot_share(phase) > 0.6, "its long rows send the vector to TOAST"


def test_a_row_that_moves_away_makes_room_for_the_others() -> None:
    row = Row(1120, 1160, waits=True)
    assert hot_forecast.staying([row] * 7) == 6, "the first finds no room"
    assert hot_forecast.staying([row] * 3) == 3, "half a page is free from the start"
    assert hot_forecast.staying([row] * 7, late=True) == 5, "the second comes before the first one's room is free"
    assert hot_forecast.staying([Row(1120, 1160, waits=False)] * 7) == 0
    assert hot_forecast.staying([Row(200, 1769, waits=True)] * 39) == 4, (
        "a vector inside the row needs the room of nine"
    )
    assert hot_forecast.staying([]) == 0


def test_the_longest_value_leaves_the_row_first(make_params: Callable[..., Params]) -> None:
    text, words = Value(900, True, 4, "x"), Value(700, True, 4, "x")
    key = Value(8, False, 8, "p")
    # 24 of header, 8, 900 and 700 bytes: no value has to go; with 1,544 of vector that one goes.
    assert hot_forecast.row_bytes([key, text, words]) == (1632, [key, text, words])
    p = make_params(vector={"dimension": 384})
    # 18 of pointer, 6 to the next eighth byte, 8 of time, 17 of hash: 1,681, in steps of eight.
    after, kept = hot_forecast.row_bytes(hot_forecast.with_vector(p, [key, text, words]))
    assert after == 1688 and [v.bytes for v in kept if v] == [8, 900, 700, 18, 8, 17]
    long = Value(1700, True, 4, "x")
    after, kept = hot_forecast.row_bytes(hot_forecast.with_vector(p, [key, long]))
    assert [v.bytes for v in kept if v] == [8, 18, 1544, 8, 17], "the text is longer than the vector"
    pinned = Value(2500, True, 4, "p")
    assert hot_forecast.row_bytes([key, pinned])[0] == 2536, "a PLAIN column stays"
    assert hot_forecast.row_bytes([key, None, None])[0] == 32, "nulls take a bit each, and no bytes"


def _loaded(open_phase: Open, dimension: int, **how: Any) -> Phase:
    source = {"source": "callable", "callable": f"tests.test_hot_forecast:embed_{dimension}"}
    phase = open_phase("50_backfill", vector={"dimension": dimension}, embeddings=source, backfill=how)
    for module in (extension, expand_schema, load_embeddings):
        module.apply(phase)
    return phase


def _counted(connection: psycopg.Connection[Any]) -> float:
    connection.execute("SELECT pg_stat_force_next_flush()")
    found = connection.execute(
        "SELECT n_tup_hot_upd::float / n_tup_upd FROM pg_stat_user_tables WHERE relname = 'articles'"
    ).fetchone()
    assert found is not None
    return float(found[0])
