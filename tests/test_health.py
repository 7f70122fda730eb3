"""Each indicator says stop where it should, and why; what the role may not ask is not available."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.backfill import batch_ranges, health
from runbook_lib.backfill.health import LastLook, State
from runbook_lib.core import db
from runbook_lib.core.phase import Phase

Open = Callable[..., Phase]


@pytest.fixture
def phase(open_phase: Open) -> Callable[..., Phase]:
    def make(**limits: Any) -> Phase:
        opened = open_phase("50_backfill", health=limits)
        batch_ranges.create(opened)
        return opened

    return make


def answers(phase: Phase, watch: LastLook | None = None) -> dict[str, health.Answer]:
    return {a.indicator: a for a in health.look(phase.connection, phase.params, watch or LastLook())}


def test_a_quiet_server_says_normal_everywhere(phase: Callable[..., Phase]) -> None:
    found = answers(phase(wal_since_checkpoint_percent=1000))
    assert {name: a.state for name, a in found.items()} == dict.fromkeys(found, State.NORMAL)
    assert set(found) == {name for name, _ in (*health.OF_THE_TARGET, *health.OF_A_SERVER)}
    assert found["archiver"].reason == "archive_mode is off"
    assert found["replica lag"].reason == "no standby is connected"


def test_wal_asks_for_a_pause_once_all_of_max_wal_size_is_written(
    phase: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that the checkpoint is spread by the clock, and a pause would last as long."""
    opened, rows = phase(), db.rows
    for filled, state in ((99, State.NORMAL), (101, State.STOP)):

        def found(connection: Any, block: Any, *given: Any, filled: int = filled, **named: Any) -> Any:
            own = {"since_checkpoint": filled, "max_wal_size": 100} if block.name == "health.wal" else {}
            return [row | own for row in rows(connection, block, *given, **named)]

        with monkeypatch.context() as patch:
            patch.setattr(health.db, "rows", found)
            assert answers(opened)["WAL"].state is state


def test_the_row_and_the_file_of_the_dba(
    phase: Callable[..., Phase], articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    stop_file = tmp_path / "stop"
    opened = phase(stop_file=str(stop_file))
    articles.execute("UPDATE runbook.control SET pause = true, reason = 'month end'")
    stop_file.touch()
    stops = health.stops(list(answers(opened).values()))
    assert [str(a) for a in stops] == ["control row: pause is true; month end", "stop file: stop is there"]


def test_a_session_that_waits_for_us(phase: Callable[..., Phase], database: str) -> None:
    opened = phase(blocked_session_ms=100)
    with psycopg.connect(database) as ours, psycopg.connect(database, application_name="the shop") as other:
        ours.execute("UPDATE articles SET views = 1 WHERE id = 1")
        waiting = threading.Thread(target=other.execute, args=("UPDATE articles SET views = 2 WHERE id = 1",))
        waiting.start()
        time.sleep(0.3)
        found = answers(opened, LastLook(pids=[ours.info.backend_pid]))["blocked sessions"]
        ours.rollback()
        waiting.join()
        other.rollback()
    assert found.state is State.STOP
    assert "the shop) waits for us since" in found.reason and found.reason.endswith("ms, 100 ms are allowed")


def test_an_old_snapshot(phase: Callable[..., Phase], database: str) -> None:
    opened = phase(oldest_snapshot_s=1)
    with psycopg.connect(database, application_name="the report") as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 1")
        assert answers(opened)["oldest snapshot"].state is State.NORMAL
        time.sleep(1.1)
        assert answers(opened)["oldest snapshot"].state is State.STOP


def test_wal_faster_than_allowed(phase: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    opened, watch = phase(wal_mb_per_s=1, wal_since_checkpoint_percent=1000), LastLook()
    assert answers(opened, watch)["WAL"].state is State.NORMAL
    articles.execute("CREATE TABLE filler AS SELECT i, repeat('x', 500) FROM generate_series(1, 20000) i")
    time.sleep(health.SHORTEST_INTERVAL_S)
    found = answers(opened, watch)["WAL"]
    assert found.state is State.STOP and found.reason.endswith("checkpoints came early; 1 MB/s are allowed")


def test_what_the_role_may_not_ask_is_not_available(
    phase: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    opened = phase()
    articles.execute("DROP ROLE IF EXISTS plain_health; CREATE ROLE plain_health")
    articles.execute("GRANT USAGE ON SCHEMA runbook TO plain_health; GRANT SELECT ON runbook.control TO plain_health")
    articles.execute("REVOKE EXECUTE ON FUNCTION pg_control_checkpoint() FROM PUBLIC")
    opened.connection.execute("SET ROLE plain_health")
    try:
        found = answers(opened)["WAL"]
    finally:
        opened.connection.execute("RESET ROLE")
        articles.execute("DROP OWNED BY plain_health; DROP ROLE plain_health")
    assert found == health.Answer(
        "WAL",
        State.NOT_AVAILABLE,
        "permission denied for function pg_control_checkpoint; GRANT pg_monitor to the runbook's role to have it",
    )


@pytest.fixture
def restless_autovacuum(articles: psycopg.Connection[Any]) -> Iterator[None]:
    """The launcher looks every second, and takes its time on the table."""
    slow = {"vacuum_cost_delay": 100, "vacuum_cost_limit": 1, "vacuum_threshold": 0, "vacuum_scale_factor": 0}
    options = ", ".join(f"autovacuum_{name} = {value}" for name, value in slow.items())
    articles.execute(f"ALTER TABLE articles SET ({options})")
    articles.execute("ALTER SYSTEM SET autovacuum_naptime = '1s'")
    articles.execute("SELECT pg_reload_conf()")
    yield
    articles.execute("ALTER SYSTEM RESET autovacuum_naptime")
    articles.execute("SELECT pg_reload_conf()")


@pytest.mark.usefixtures("restless_autovacuum")
def test_autovacuum_at_work_on_the_table(phase: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    opened = phase()
    articles.execute("INSERT INTO articles (title) SELECT 'row ' || i FROM generate_series(1, 3000) i")
    articles.execute("UPDATE articles SET views = views + 1")
    found, until = answers(opened)["autovacuum"], time.monotonic() + 60
    while found.state is State.NORMAL:
        assert time.monotonic() < until, "no autovacuum came"
        time.sleep(0.05)
        found = answers(opened)["autovacuum"]
    assert found.state is State.STOP
    assert found.reason.startswith("at work on articles, ")
    let_go = opened.params.model_copy(
        update={"health": opened.params.health.model_copy(update={"pause_for_autovacuum": False})}
    )
    found = {a.indicator: a for a in health.look(opened.connection, let_go, LastLook())}["autovacuum"]
    assert found.state is State.NORMAL
    articles.execute("DROP TABLE articles")
    assert answers(opened)["autovacuum"].reason == "not at work on the table"
