"""What other sessions and a DBA do to the backfill: freeze it, hold locks and snapshots, delete and change rows."""

import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.backfill import batch_ranges, change_queue
from runbook_lib.core.gates import PausedTooLong
from runbook_lib.migrate import backfill, expand_schema, extension
from tests.conftest import write_params
from tests.drills import kit

pytestmark = pytest.mark.drill

# Of the rows that were changed, those that a writer has deleted since, or emptied: it gives them no title again.
GONE = "SELECT 150 - count(*) FROM articles WHERE id <= 150 AND title IS NOT NULL"
HELD_S = 60.0 if kit.FULL else 2.0


def open_window(articles: psycopg.Connection[Any]) -> bool:
    """Has a worker claimed a window and done something in it?"""
    row = articles.execute(
        "SELECT to_regclass('runbook.articles_window') IS NOT NULL AND (SELECT count(embedding) > 0 FROM articles)"
    ).fetchone()
    if not row or not row[0]:
        return False
    found = articles.execute("SELECT FROM runbook.articles_window WHERE done_at IS NULL AND claimed_by IS NOT NULL")
    return bool(found.fetchall())


def test_a_worker_that_freezes_loses_its_window_and_does_no_harm_when_it_wakes(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path
) -> None:
    # Long rests, so that the window is still at work when the signal comes, however busy the machine.
    params_file = kit.prepared(tmp_path, "load", backfill={"pause_between_batches_ms": 150})
    with kit.writers(database), kit.in_a_process("backfill", params_file) as process:
        kit.wait_for(lambda: open_window(articles), "a window at work")
        process.send_signal(signal.SIGSTOP)
        kit.go_on(params_file)
        process.send_signal(signal.SIGCONT)
        process.wait(kit.LONGEST_STEP_S)
    kit.finish(params_file)
    taken_over = "SELECT max((body->>'windows_taken_over')::int) FROM runbook.entry WHERE kind = 'backfill'"
    found = articles.execute(taken_over).fetchone()
    # A busy machine may freeze another one for longer than its lease.
    assert found is not None and found[0] >= 1
    kit.nothing_is_lost(database, "a worker stopped (SIGSTOP), its window taken over, and woken")


def test_two_processes_share_the_work(articles: psycopg.Connection[Any], database: str, tmp_path: Path) -> None:
    params_file = kit.prepared(tmp_path, "load", backfill={"workers": 2, "strategy": "key_ranges"})
    # A helper asks the ledger, as a run of the notebooks leaves it, whether the load is proved.
    with kit.opened(params_file, "40_load_embeddings") as phase:
        phase.ledger.append("phase", {"verdict": "PASS"})
    with kit.writers(database), kit.in_a_process("backfill", params_file) as one:
        kit.wait_for(lambda: open_window(articles), "a window at work")
        backfill.help_out(str(params_file))
        one.wait(kit.LONGEST_STEP_S)
        assert one.returncode == 0
    kit.finish(params_file)
    kit.nothing_is_lost(database, "two processes at one backfill")


def test_an_old_snapshot_holds_the_backfill_until_it_is_gone(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path
) -> None:
    params_file = kit.prepared(tmp_path, "load", health={"oldest_snapshot_s": 1})
    with psycopg.connect(database, application_name="the forgotten report") as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM articles")
        time.sleep(1.2)
        ended = threading.Timer(6.0, reader.rollback)
        with kit.writers(database), kit.opened(params_file) as phase:
            ended.start()
            backfill.apply(phase)
            paused = phase.ledger.latest("pause")
        ended.join()
    assert paused is not None and paused["seconds"] >= 1
    assert "the forgotten report, idle in transaction) is open since" in paused["reason"]
    kit.finish(params_file)
    kit.nothing_is_lost(database, "an idle-in-transaction snapshot during the backfill")


def test_a_pause_that_does_not_end_ends_the_phase_which_goes_on_later(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path
) -> None:
    params_file = kit.prepared(tmp_path, "load", health={"longest_pause_minutes": 0.02})
    with kit.opened(params_file) as phase:
        batch_ranges.create(phase)
        articles.execute("UPDATE runbook.control SET pause = true, reason = 'month end' WHERE target = 'articles'")
        with pytest.raises(PausedTooLong, match="control row: pause is true; month end"):
            backfill.apply(phase)
        assert articles.execute("SELECT count(embedding) FROM articles").fetchone() == (0,), "it never began"
        articles.execute("UPDATE runbook.control SET pause = false WHERE target = 'articles'")
    kit.finish(params_file)
    kit.nothing_is_lost(database, "a pause by the DBA that does not end")


def test_a_session_that_holds_the_table_against_the_ddl(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path
) -> None:
    """Readers beside it wait no longer than one try, however long the holder stays."""
    locks = {"timeout_ms": 100, "tries": 400, "longest_wait_between_tries_s": 0.2}
    params_file = write_params(tmp_path, locks=locks)
    waits: list[float] = []
    stop = threading.Event()

    def read() -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            while not stop.wait(0.01):
                started = time.perf_counter()
                connection.execute("SELECT count(*) FROM articles")
                waits.append(time.perf_counter() - started)

    with psycopg.connect(database, application_name="the long report") as holder, kit.opened(params_file) as phase:
        extension.apply(phase)
        holder.execute("SELECT count(*) FROM articles")
        ended = threading.Timer(HELD_S, holder.rollback)
        reader = threading.Thread(target=read)
        ended.start()
        reader.start()
        expand_schema.apply(phase)
        stop.set()
        reader.join()
        ended.join()
        assert expand_schema.plan(phase).statements == ()
    assert max(waits) < 1.0
    kit.finish(params_file)
    kit.nothing_is_lost(database, f"ACCESS SHARE held for {HELD_S:.0f} s against the DDL")


@pytest.mark.parametrize("layout", ["column", "side_table"])
def test_rows_deleted_between_load_and_backfill(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path, layout: str
) -> None:
    params_file = kit.prepared(tmp_path, "load", vector={"layout": layout})
    articles.execute("DELETE FROM articles WHERE id % 3 = 0")
    kit.finish(params_file)
    kit.nothing_is_lost(database, "rows deleted between load and backfill", layout=layout)


@pytest.mark.parametrize("layout", ["column", "side_table"])
def test_a_text_changed_a_hundred_times_during_the_backfill(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path, layout: str
) -> None:
    params_file = kit.prepared(tmp_path, "load", vector={"layout": layout})

    def change() -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            for i in range(100):
                connection.execute("UPDATE articles SET body = %s WHERE id = 5", [f"the cookie expires {i} times"])

    changes = threading.Thread(target=change)
    with kit.opened(params_file) as phase:
        changes.start()
        backfill.apply(phase)
    changes.join()
    kit.finish(params_file)
    kit.nothing_is_lost(database, "a text changed 100 times during the backfill", layout=layout)


def test_temporary_files_run_out(articles: psycopg.Connection[Any], database: str, tmp_path: Path) -> None:
    articles.execute(
        "INSERT INTO articles (title, body)"
        " SELECT 'row ' || i, 'the socket blocks ' || i FROM generate_series(1, 4000) i"
    )
    params_file = kit.prepared(tmp_path, "load", embeddings={"batch_rows": 1000}, backfill={"most_batch_rows": 1000})
    name = articles.info.dbname
    articles.execute(f"ALTER DATABASE {name} SET work_mem = '64kB'; ALTER DATABASE {name} SET temp_file_limit = 0")
    with pytest.raises(psycopg.errors.ConfigurationLimitExceeded), kit.opened(params_file) as phase:
        backfill.apply(phase)
    articles.execute(f"ALTER DATABASE {name} RESET work_mem; ALTER DATABASE {name} RESET temp_file_limit")
    kit.finish(params_file)
    kit.nothing_is_lost(database, "temp_file_limit reached in the backfill")


def test_rows_that_somebody_holds_for_long_while_the_queue_is_drained(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path
) -> None:
    """The others are refreshed meanwhile; these wait in the queue, which says who holds them."""
    params_file = kit.prepared(tmp_path, "backfill")
    kit.change_texts(database, 150)
    with psycopg.connect(database, application_name="the forgotten form") as holder, kit.opened(params_file) as phase:
        holder.execute("SELECT FROM articles WHERE id IN (3, 77) FOR UPDATE")
        with kit.writers(database):
            drained = change_queue.drain(phase)
            gone = articles.execute(GONE).fetchone()
            assert gone is not None
            assert drained.changes >= 148 and drained.updated >= 148 - gone[0] and drained.put_off >= 2
            assert "held by another session; pid" in change_queue.waiting(phase.connection, phase.params).why
            assert "the forgotten form" in change_queue.waiting(phase.connection, phase.params).why
            # A writer may wait for these rows too, and the writers are waited for at the end of the block.
            holder.rollback()
    kit.finish(params_file)
    kit.nothing_is_lost(database, "rows held for long while the queue is drained")


def test_under_constant_writes_nothing_is_left_or_the_gates_say_what_is_queued_and_why(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path
) -> None:
    params_file = kit.prepared(tmp_path, "load")
    with kit.opened(params_file) as phase, kit.writers(database):
        for _ in range(5):
            backfill.apply(phase)
            gates = {g.name: g for g in backfill.verify(phase)}
            for name in ("backfill.nothing_is_missing", "backfill.nothing_is_stale"):
                if gates[name].verdict != "PASS":
                    assert re.search(r"; [1-9][\d,]* queued, changed since the last drain", gates[name].found)
    kit.finish(params_file)
    kit.nothing_is_lost(database, "constant writes through five backfills")
