"""Connections with bounded waits, and messages without secrets."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from runbook_lib.core import db, redaction
from runbook_lib.core.gates import BadInput, Gate
from runbook_lib.params import Params
from tests.conftest import DSN_ENV

MakeParams = Callable[..., Params]


def _refused(p: Params) -> Gate:
    with pytest.raises(BadInput) as error:
        db.connect(p, "test")
    assert "hunter2" not in str(error.value)
    cause: BaseException | None = error.value
    while cause is not None and (
        cause := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    ):
        assert "hunter2" not in str(cause)
    return error.value.problems.gates[0]


def _add_column(p: Params) -> db.Statement:
    query = sql.SQL("ALTER TABLE articles ADD COLUMN x int").format()
    return db.Statement("test.add", "add a column", "ACCESS EXCLUSIVE on articles", "drop it", query, {})


@pytest.mark.attack
@pytest.mark.parametrize("how", ["in_short_tries", "rolled_back"])
def test_locks_of_a_session_that_froze_are_given_back(
    articles: psycopg.Connection[Any], make_params: MakeParams, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(db, "FROZEN_MS", 200)
    p = make_params()

    def freeze() -> None:
        connection.execute("LOCK TABLE articles IN ACCESS EXCLUSIVE MODE")
        articles.execute("SET lock_timeout = '30s'; SELECT FROM articles LIMIT 1")

    with db.connect(p, "test") as connection, pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
        if how == "in_short_tries":
            db.in_short_tries(connection, p, "test.lock", "ACCESS EXCLUSIVE", freeze)
        else:
            with db.rolled_back(connection):
                freeze()
                connection.execute("SELECT 1")


def test_an_unset_variable_is_named(make_params: MakeParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DSN_ENV, raising=False)
    assert str(_refused(make_params())) == (
        f"FAIL    db.server_is_reachable   environment variable {DSN_ENV}\n"
        "  found   not set\n"
        "  needed  a connection to the target's server\n"
        "  danger  nothing can be looked at, so nothing was started\n"
        f"  do      export {DSN_ENV}=…"
    )


@pytest.mark.attack
@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:hunter2@127.0.0.1:1/d",
        "host=127.0.0.1 port=1 user=u password=hunter2",
        "host=/nowhere/at/all password=hunter2 dbname=d",
        "host=127.0.0.1 port=1 sslmode=require user=hunter2u password=hunter2",
    ],
)
def test_an_unreachable_server_is_reported_without_the_password(
    make_params: MakeParams, monkeypatch: pytest.MonkeyPatch, dsn: str
) -> None:
    monkeypatch.setenv(DSN_ENV, dsn)
    g = _refused(make_params())
    assert (g.name, g.subject) == ("db.server_is_reachable", "the server")
    assert "connection" in g.found


@pytest.mark.attack
@pytest.mark.parametrize(
    "dsn",
    ["postgresql://u:hunter2@[", "host=h password='hunter2", "pass=hunter2", "postgresql://u:hunter2@h:notaport/d"],
)
def test_a_broken_connection_string_is_not_quoted(
    make_params: MakeParams, monkeypatch: pytest.MonkeyPatch, dsn: str
) -> None:
    monkeypatch.setenv(DSN_ENV, dsn)
    _refused(make_params())


@pytest.mark.attack
def test_a_password_of_the_environment_is_not_printed_either(
    make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DSN_ENV, "host=127.0.0.1 port=1 user=u")
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    _refused(make_params())


@pytest.mark.attack
def test_a_password_that_libpq_found_in_a_file_is_kept_out_of_the_record_too(
    make_params: MakeParams, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passfile = tmp_path / "passwords"
    passfile.write_text("*:*:*:*:fr0m a file\n")
    passfile.chmod(0o600)
    monkeypatch.setenv(DSN_ENV, f"  {database}\n")
    p = make_params(connection={"passfile": str(passfile)})
    db.connect(p, "t").close()
    assert redaction.redacted("its password is fr0m a file.") == "its password is ***."


def test_a_database_that_is_not_there_is_named(
    make_params: MakeParams, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DSN_ENV, psycopg.conninfo.make_conninfo(database, dbname="nowhere"))
    assert 'database "nowhere" does not exist' in _refused(make_params()).found


def test_a_missing_service_is_reported(make_params: MakeParams, monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_params()
    p = p.model_copy(update={"connection": type(p.connection)(service="no_such_service")})
    assert "no_such_service" in _refused(p).found


def test_a_session_waits_briefly_and_names_itself(make_params: MakeParams, database: str) -> None:
    with db.connect(make_params(), "runbook " + "n" * 80) as connection:
        shown = {
            name: connection.execute("SELECT current_setting(%s) AS v", [name]).fetchone()["v"]  # type: ignore[index]
            for name in (
                "lock_timeout",
                "idle_in_transaction_session_timeout",
                "client_connection_check_interval",
                "application_name",
            )
        }
    assert shown == {
        "lock_timeout": "100ms",
        "idle_in_transaction_session_timeout": "10min",
        "client_connection_check_interval": "1s",
        "application_name": ("runbook " + "n" * 80)[:63],
    }


def test_the_search_path_finds_the_extension_in_a_quoted_schema(make_params: MakeParams, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute('CREATE SCHEMA "Odd, ""schema"; CREATE EXTENSION vector SCHEMA "Odd, ""schema"')
    with db.connect(make_params(), "test") as connection:
        db.use_search_path(connection)
        assert connection.execute("SELECT '[1]'::vector <-> '[3]' AS d").fetchone() == {"d": 2}
        path = connection.execute("SHOW search_path").fetchone()
    assert path == {"search_path": 'pg_catalog, public, "Odd, ""schema", pg_temp'}


def test_a_statement_gets_its_lock_when_the_reader_ends(
    articles: psycopg.Connection[Any], make_params: MakeParams
) -> None:
    p = make_params(locks={"timeout_ms": 50, "tries": 50, "longest_wait_between_tries_s": 0.05})
    said: list[str] = []
    with db.connect(p, "the reader") as reader, db.connect(p, "worker") as worker:
        reader.execute("BEGIN; SELECT count(*) FROM articles")
        threading.Timer(0.3, reader.execute, ["COMMIT"]).start()
        done = db.carry_out(worker, p, _add_column(p), say=said.append)
    assert done.tries > 1 and "the reader" in said[0] and said[-1].endswith(f"{done.tries} tries")


def test_a_waiting_statement_lets_other_readers_pass_between_tries(
    articles: psycopg.Connection[Any], make_params: MakeParams
) -> None:
    p = make_params(locks={"timeout_ms": 50, "tries": 4, "longest_wait_between_tries_s": 0.1})
    waits: list[float] = []

    def read_meanwhile(seconds: float) -> None:
        waits.append(seconds)
        started = time.perf_counter()
        articles.execute("SELECT count(*) FROM articles")
        assert time.perf_counter() - started < 0.5

    with db.connect(p, "the reader") as reader, db.connect(p, "worker") as worker, reader.transaction():
        reader.execute("SELECT count(*) FROM articles")
        with pytest.raises(db.LockNotObtained) as error:
            db.carry_out(worker, p, _add_column(p), say=lambda _: None, sleep=read_meanwhile)
    assert waits == [0.1, 0.1, 0.1]
    assert error.value.found.startswith("test.add did not get its lock in 4 tries; pid ")
    assert (error.value.needed, error.value.danger, error.value.do) == (
        "ACCESS EXCLUSIVE on articles, waiting at most 50 ms a try",
        "waiting longer would queue every reader and writer of the table behind this statement",
        "end that session, or run this phase again at a quieter time: what was done before stays done",
    )


def test_another_error_rises_at_once_and_changes_nothing(
    articles: psycopg.Connection[Any], make_params: MakeParams
) -> None:
    p = make_params()
    bad = db.Statement("test.bad", "fail", "", "", sql.SQL("ALTER TABLE articles ADD COLUMN id int").format(), {})
    with db.connect(p, "worker") as worker, pytest.raises(psycopg.errors.DuplicateColumn):
        db.carry_out(worker, p, bad)


def test_a_plan_can_be_pasted_and_says_whom_it_blocks(
    articles: psycopg.Connection[Any], make_params: MakeParams
) -> None:
    p = make_params()
    with db.connect(p, "worker") as worker:
        plan = db.Plan((_add_column(p),), worker)
        assert str(plan) == (
            "-- add a column\n"
            "-- lock: ACCESS EXCLUSIVE on articles; blocks every read and write; undo: drop it\n"
            "ALTER TABLE articles ADD COLUMN x int;"
        )
        assert db.rendered(plan, worker)[0]["sql"] == "ALTER TABLE articles ADD COLUMN x int;"
        assert str(db.Plan((), worker)) == "Nothing is left to do here."
