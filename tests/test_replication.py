"""Logical replication between two real databases: what is said of a subscriber is what happens to it."""

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from runbook_lib.backfill import change_queue
from runbook_lib.migrate import backfill, expand_schema, extension, inputs, load_embeddings
from runbook_lib.params import Params
from runbook_lib.search import search_function
from tests import servers, toy
from tests.conftest import DSN_ENV
from tests.opened import opened

Connection = psycopg.Connection[Any]
ARRIVES_S = 30.0
PLAIN = "CREATE TABLE articles (id bigint PRIMARY KEY, title text, body text, status text, views int)"


@pytest.fixture(scope="module")
def logical() -> Iterator[str]:
    """DSN of a server that sends and takes logical replication."""
    # Sockets stand in it, so its name is short.
    folder = Path(tempfile.mkdtemp(prefix="logical-"))
    # Workers begin again at once, where they wait for five seconds by default.
    more = "-c wal_level=logical -c wal_retrieve_retry_interval=100ms"
    try:
        with servers.running("18.6 with 0.8.6", folder / "data", more) as dsn:
            yield dsn
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def pair(logical: str) -> Iterator[tuple[Connection, Connection]]:
    """Publisher and subscriber of ``public.articles``; the latter has the columns that the table had."""
    names = ("publisher", "subscriber")
    with psycopg.connect(logical, autocommit=True) as admin:
        for name in names:
            admin.execute(f"CREATE DATABASE {name}")
    from_, to = (psycopg.connect(make_conninfo(logical, dbname=name), autocommit=True) for name in names)
    with from_, to:
        toy.create_articles(from_)
        from_.execute("CREATE PUBLICATION told FOR TABLE articles")
        # Of its own server a subscription cannot make the slot: it would wait for its own transaction.
        from_.execute("SELECT pg_create_logical_replication_slot('heard', 'pgoutput')")
        to.execute(PLAIN)
        source = make_conninfo(logical, dbname="publisher").replace("'", "''")
        to.execute(f"CREATE SUBSCRIPTION heard CONNECTION '{source}' PUBLICATION told WITH (create_slot = false)")
        until(lambda: to.execute("SELECT count(*) FROM articles").fetchone() == (toy.ROWS + 1,))
        yield from_, to
        to.execute("DROP SUBSCRIPTION heard")
    with psycopg.connect(logical, autocommit=True) as admin:
        for name in names:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + ARRIVES_S
    while not holds():
        assert time.monotonic() < ends, f"not within {ARRIVES_S} s"
        time.sleep(0.05)


def test_a_subscriber_without_the_columns_stops_and_goes_on_after_the_statement_that_the_gate_names(
    pair: tuple[Connection, Connection], make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, subscriber = pair
    monkeypatch.setenv(DSN_ENV, publisher.info.dsn)
    p = make_params()
    (refused,) = inputs.input_problems(p).failed
    assert "logical slots here: heard (pgoutput, active)" in refused.found
    phase = opened(p)
    for module in (search_function, extension, expand_schema):
        module.apply(phase)
    publisher.execute("UPDATE articles SET views = 7 WHERE id = 9")
    errors = "SELECT apply_error_count > 0 FROM pg_stat_subscription_stats"
    until(lambda: subscriber.execute(errors).fetchone() == (True,))
    seen = "SELECT views FROM articles WHERE id = 9"
    assert subscriber.execute(seen).fetchone() == (0,)

    (alter,) = re.findall(r"ALTER TABLE [^;]*;", refused.do)
    subscriber.execute(f"CREATE EXTENSION vector; {alter}")
    until(lambda: subscriber.execute(seen).fetchone() == (7,))
    for module in (load_embeddings, backfill):
        module.apply(phase)
    until(lambda: subscriber.execute("SELECT count(embedding) FROM articles").fetchone() == (toy.ROWS,))
    phase.end("was ended by the test", "nothing")


def test_rows_that_arrive_by_replication_get_their_vectors(
    pair: tuple[Connection, Connection], make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table that is migrated is the subscriber's."""
    publisher, subscriber = pair
    monkeypatch.setenv(DSN_ENV, subscriber.info.dsn)
    phase = opened(make_params(search={"fulltext_column": None}))
    for module in (search_function, extension, expand_schema, load_embeddings, backfill):
        module.apply(phase)
    publisher.execute("UPDATE articles SET body = 'the buffer' WHERE id = 9")
    until(lambda: subscriber.execute("SELECT key FROM runbook.articles_queue").fetchall() == [(9,)])
    assert change_queue.drain(phase).updated == 1
    publisher.execute("UPDATE articles SET views = 8 WHERE id = 9")
    until(lambda: subscriber.execute("SELECT views FROM articles WHERE id = 9").fetchone() == (8,))
    assert backfill.verify(phase).passed
    phase.end("was ended by the test", "nothing")
