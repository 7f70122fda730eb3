"""A pooler that shares its server sessions is refused, and leaves with nothing set; one in session mode is served."""

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.core import db, session
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.params import Params
from runbook_lib.search import search_function
from tests import poolers
from tests.conftest import DSN_ENV

MakeParams = Callable[..., Params]
KINDS = [poolers.stand_in, poolers.pgbouncer]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a name short enough for a socket."""
    made = Path(tempfile.mkdtemp(prefix="pool-"))
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool_size", [1, 5])
def test_a_pooler_in_transaction_mode_is_refused_and_nothing_is_set_in_its_pool(
    database: str, make_params: MakeParams, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, pool_size: int
) -> None:
    with kind(database, folder, "transaction", pool_size) as dsn:
        monkeypatch.setenv(DSN_ENV, dsn)
        with pytest.raises(BadInput) as refused:
            db.connect(make_params(), "test")
        (gate,) = refused.value.problems.gates
        assert str(gate) == (
            "FAIL    db.session_is_its_own   the server\n"
            "  found   a connection pooler in transaction or statement mode: two sessions were answered by one server"
            " process\n"
            "  needed  a direct connection to PostgreSQL, or a pool in session mode with sessions to spare\n"
            "  danger  settings, advisory locks and claims would end, or reach other clients, between two"
            " statements\n"
            "  do      put the server's own address and port into the DSN (often port 5432 instead of 6432), or a"
            " pool with pool_mode = session"
        )
        with psycopg.connect(dsn, autocommit=True) as application:
            assert application.execute("SHOW search_path").fetchone() == ('"$user", public',)
            assert application.execute("SELECT name FROM pg_prepared_statements").fetchall() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_in_use_is_told_by_the_transactions_of_others(
    database: str, make_params: MakeParams, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """Its sessions are free for one moment and taken the next: comparing processes alone would miss it at times."""
    done = threading.Event()

    def ask(dsn: str) -> None:
        with psycopg.connect(dsn, autocommit=True) as application:
            while not done.is_set():
                application.execute("SELECT 1", prepare=False)

    with kind(database, folder, "transaction", 3) as dsn:
        monkeypatch.setenv(DSN_ENV, dsn)
        others = [threading.Thread(target=ask, args=(dsn,)) for _ in range(2)]
        for other in others:
            other.start()
        try:
            for _ in range(10):
                with pytest.raises(BadInput, match="transaction or statement mode"):
                    db.connect(make_params(), "test")
        finally:
            done.set()
            for other in others:
                other.join()


def test_a_pooler_in_statement_mode_is_refused(
    database: str, make_params: MakeParams, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with poolers.pgbouncer(database, folder, "statement", 3) as dsn:
        monkeypatch.setenv(DSN_ENV, dsn)
        with pytest.raises(BadInput, match="two sessions were answered by one server process"):
            db.connect(make_params(), "test")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_without_a_second_session_is_unknown_and_so_refused(
    database: str, make_params: MakeParams, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr(session, "LONGEST_TRIAL_S", 0.2)
    with kind(database, folder, "session", 1) as dsn:
        monkeypatch.setenv(DSN_ENV, dsn)
        with pytest.raises(BadInput) as refused:
            db.connect(make_params(), "test")
    (gate,) = refused.value.problems.gates
    assert (gate.verdict, gate.found) == (
        "UNKNOWN",
        "a connection pooler, whose mode could not be found out: it gave no second session within 0.2 s",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_pooler_in_session_mode_is_served(
    database: str, make_params: MakeParams, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    with kind(database, folder, "session", 3) as dsn:
        monkeypatch.setenv(DSN_ENV, dsn)
        with db.connect(make_params(), "test") as connection:
            assert db.server_pid(connection) != connection.info.backend_pid
            assert connection.execute("SHOW TimeZone").fetchone() == {"TimeZone": "UTC"}


def test_a_migration_through_pgbouncer_in_session_mode(
    articles: psycopg.Connection[Any],
    open_phase: Callable[..., Phase],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    database: str,
) -> None:
    with poolers.pgbouncer(database, folder, "session", 12) as dsn:
        monkeypatch.setenv(DSN_ENV, dsn)
        phase = open_phase("60_build_index")
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        assert backfill.verify(phase).passed
        phase.end("was ended by the test", "nothing")
