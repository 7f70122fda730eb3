"""A table becomes a partitioned one while it is written to: no row lost, no writer refused, and the same rollback."""

import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.backfill import health, online_copy, partitioned_twin, throttle
from runbook_lib.core import db
from runbook_lib.core.gates import GateFailed
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE
from runbook_lib.core.target import load_params
from runbook_lib.indexes import building
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.operate import partition_by_filter, partition_proof
from runbook_lib.search import search_function
from tests import servers, toy
from tests.conftest import DSN_ENV, write_params
from tests.opened import gates_passed
from tests.stepping import step, step_all
from tests.test_search_function import call
from tests.test_serve_filters import EXACT, TARGET, many_rows
from tests.test_server_versions import SECTIONS

Open = Callable[..., Phase]
DIVIDE: dict[str, Any] = {"column": "status", "accept_wider_key": True, "most_rows_in_swap": 200}
PATIENT = {"locks": {"timeout_ms": 300, "tries": 40, "longest_wait_between_tries_s": 0.1}}
FEW_ASKED = {"tune": TARGET["tune"] | {"queries": 16}}
TIMES = 5


def dressed(connection: psycopg.Connection[Any]) -> None:
    """What a table may have beside its columns: all of it must come along."""
    connection.execute(
        """
        CREATE TABLE seen (what text);
        CREATE FUNCTION note_change() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO seen VALUES (TG_OP || coalesce(NEW.id, OLD.id)); RETURN NULL; END $$;
        CREATE TRIGGER noted AFTER DELETE ON articles FOR EACH ROW
            WHEN (OLD.views < 50) EXECUTE FUNCTION note_change();
        CREATE SEQUENCE numbers OWNED BY articles.views;
        ALTER TABLE articles ADD CONSTRAINT sane CHECK (views >= 0);
        ALTER TABLE articles SET (fillfactor = 80);
        ALTER TABLE articles ALTER COLUMN title SET STATISTICS 77;
        COMMENT ON TABLE articles IS 'what we know, 100 % of it';
        COMMENT ON COLUMN articles.body IS 'all of it';
        GRANT SELECT ON articles TO PUBLIC;
        GRANT UPDATE (views) ON articles TO pg_monitor;
        CREATE POLICY mine ON articles FOR SELECT TO pg_monitor USING (status <> 'Draft');
        ALTER TABLE articles ENABLE ROW LEVEL SECURITY;
        """
    )


def look(connection: psycopg.Connection[Any], table: str = "articles") -> dict[str, Any]:
    """What somebody sees of a table, whatever it is made of: columns, rights, triggers, policies, indexes."""
    queries = {
        "columns": "SELECT attname, format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated,"
        " attstorage, pg_get_expr(d.adbin, d.adrelid), greatest(attstattarget, -1), col_description(attrelid, attnum)"
        " FROM pg_attribute a LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)"
        " WHERE attrelid = %(t)s::regclass AND attnum > 0 ORDER BY attnum",
        "rights": "SELECT relowner, relrowsecurity, relacl::text, obj_description(oid) FROM pg_class"
        " WHERE oid = %(t)s::regclass",
        "column rights": "SELECT attname, attacl::text FROM pg_attribute WHERE attrelid = %(t)s::regclass"
        " AND attacl IS NOT NULL",
        "triggers": "SELECT pg_get_triggerdef(oid), tgenabled FROM pg_trigger WHERE tgrelid = %(t)s::regclass"
        " AND NOT tgisinternal AND tgname NOT LIKE '%%move%%' ORDER BY 1",
        "policies": "SELECT policyname, roles, cmd, qual FROM pg_policies WHERE tablename = %(t)s",
        "checks": "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %(t)s::regclass"
        " AND contype = 'c'",
        "indexes": "SELECT c.relname, replace(pg_get_indexdef(c.oid), ' ONLY ', ' ') FROM pg_index i JOIN pg_class c"
        " ON c.oid = i.indexrelid WHERE i.indrelid = %(t)s::regclass AND i.indisvalid AND NOT i.indisprimary"
        " ORDER BY 1",
        "keys": "SELECT conname FROM pg_constraint WHERE conrelid = %(t)s::regclass AND contype = 'p'",
        "sequence of views": "SELECT pg_get_serial_sequence(%(t)s, 'views')",
    }
    return {name: connection.execute(query, {"t": table}).fetchall() for name, query in queries.items()}


def checksum(connection: psycopg.Connection[Any], table: str = "articles") -> Any:
    query = f"SELECT count(*), md5(string_agg(t::text, '|' ORDER BY id)) FROM {table} t"
    return connection.execute(query).fetchone()


@pytest.fixture
def ready(open_phase: Open, articles: psycopg.Connection[Any]) -> Callable[..., Phase]:
    """Opens the operation on a searched table; its writers' sessions get what the table has beside columns."""
    many_rows(articles, TIMES)
    dressed(articles)

    def make(**sections: Any) -> Phase:
        phase = open_phase(
            "operate/partition_by_filter", **(TARGET | PATIENT | FEW_ASKED | {"partitioning": DIVIDE} | sections)
        )
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        db.use_search_path(phase.connection)
        for statement in search_function.set_search_setting(phase.connection, phase.params, 40):
            phase.do(statement)
        learnt = {"filter": "status", "values": [None], "shares": [0.0], "recall": 1.0, "p50_ms": 9.0}
        phase.do(db.statement(search_function.SQL["learn_strategy"], phase.params, **learnt, **EXACT))
        articles.execute("ANALYZE articles")
        search_function.move_route(phase, "vector", 100, "test")
        return phase

    return make


class Writers:
    """Threads that insert, update and delete all the time; what they did, and every error that they got."""

    def __init__(self, dsn: str, n: int = 3) -> None:
        self.stop, self.errors, self.longest = threading.Event(), [], 0.0  # type: ignore[var-annotated]
        self.alive: dict[int, int] = {}
        self.gone: set[int] = set()
        self.writes = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._write, args=(dsn, i), daemon=True) for i in range(n)]

    def _write(self, dsn: str, seed: int) -> None:
        draw = random.Random(seed)
        own: list[int] = []
        try:
            with psycopg.connect(dsn, autocommit=True, prepare_threshold=2) as connection:
                while not self.stop.is_set():
                    started = time.perf_counter()
                    what = draw.random()
                    if what < 0.4 or not own:
                        row = connection.execute(
                            "INSERT INTO articles (title, body, status, views) VALUES (%s, 'new', %s, 60)"
                            " RETURNING id",
                            [f"w{seed}", draw.choice(["Draft", "Stable", "never seen"])],
                        ).fetchone()
                        assert row
                        own.append(row[0])
                        self._note(row[0], 60)
                    elif what < 0.8:
                        key, views = draw.choice(own), draw.randrange(60, 1000)
                        moved = ", status = 'Stable'" if what < 0.5 else ""
                        n = connection.execute(f"UPDATE articles SET views = %s{moved} WHERE id = %s", [views, key])
                        assert n.rowcount == 1, f"row {key} is not there"
                        self._note(key, views)
                    else:
                        key = own.pop(draw.randrange(len(own)))
                        n = connection.execute("DELETE FROM articles WHERE id = %s", [key])
                        assert n.rowcount == 1, f"row {key} is not there"
                        self._note(key, None)
                    self.longest = max(self.longest, time.perf_counter() - started)
                    self.writes += 1
                    time.sleep(0.002)
        except Exception as error:  # the test says what it was
            self.errors.append(error)

    def _note(self, key: int, views: int | None) -> None:
        with self._lock:
            if views is None:
                del self.alive[key]
                self.gone.add(key)
            else:
                self.alive[key] = views

    def __enter__(self) -> "Writers":
        for thread in self._threads:
            thread.start()
        time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join()

    def lost(self, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        """What a writer did and the table does not know."""
        there = dict(connection.execute("SELECT id, views FROM articles WHERE body = 'new'").fetchall())
        return {
            "missing or old": {k: v for k, v in self.alive.items() if there.get(k) != v},
            "came back": self.gone & set(there),
            "twice": len(there)
            != connection.execute("SELECT count(*) FROM articles WHERE body = 'new'").fetchone()[0],  # type: ignore[index]
        }


NOTHING_LOST = {"missing or old": {}, "came back": set(), "twice": False}


def settle(phase: Phase) -> None:
    with phase.opened():
        online_copy.catch_up(phase, partitioned_twin.move(phase.connection, phase.params), few=0)


def test_under_writers_there_and_back_no_row_is_lost_and_no_writer_refused(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], database: str
) -> None:
    phase = ready()
    before, function = look(articles), search_function.function_state(phase.connection, phase.params)
    assert partition_by_filter.check(phase).passed, str(partition_by_filter.check(phase))
    with Writers(database) as writers:
        partition_by_filter.apply(phase)
        assert partition_by_filter.verify_copy(phase).passed
        partition_by_filter.swap(phase)
        swapped_after = writers.writes
        time.sleep(0.5)
        gates = partition_by_filter.verify(phase)
        assert gates.passed, str(gates)
        assert writers.writes > swapped_after
    assert writers.errors == []
    assert writers.lost(articles) == NOTHING_LOST
    settle(phase)
    assert checksum(articles) == checksum(articles, "articles_whole"), "independent of the gate"
    figures = phase.ledger.latest("partition swap")
    assert figures is not None and figures["drained"] <= 200 and figures["seconds"] < 5.0
    assert look(articles) == before, "nothing that somebody sees has changed"
    assert search_function.function_state(phase.connection, phase.params) == function
    found = call(articles, "cookie leaks", status="Draft")
    statuses = articles.execute(
        "SELECT DISTINCT status FROM articles WHERE id = ANY (%s)", [[r["id"] for r in found]]
    )
    assert statuses.fetchall() == [("Draft",)] and len(found) == 10

    with Writers(database) as again:
        partition_by_filter.undo(phase)
        time.sleep(0.3)
    assert again.errors == []
    again.alive |= {k: v for k, v in writers.alive.items() if k not in again.gone}
    assert again.lost(articles) == NOTHING_LOST
    assert writers.lost(articles) == NOTHING_LOST
    assert partition_by_filter.verify_undone(phase).passed
    assert look(articles) == before
    assert articles.execute("SELECT count(*) FROM seen").fetchone() == (0,), (
        "no trigger fired for a row that was moved"
    )
    articles.execute("DELETE FROM articles WHERE id = 3")
    assert articles.execute("SELECT what FROM seen").fetchall() == [("DELETE3",)]
    partition_by_filter.undo(phase)


def test_by_hash_a_truncate_and_a_changed_key_are_followed(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready(partitioning=DIVIDE | {"method": "hash", "hash_partitions": 3})
    partition_by_filter.apply(phase)
    articles.execute("UPDATE articles SET id = 100000 WHERE id = 5")
    settle(phase)
    assert partition_by_filter.verify_copy(phase).passed
    articles.execute("TRUNCATE articles")
    articles.execute("INSERT INTO articles (id, title, status) VALUES (7, 'after', 'Draft')")
    partition_by_filter.swap(phase)
    assert articles.execute("SELECT id, title FROM articles").fetchall() == [(7, "after")]
    assert checksum(articles) == checksum(articles, "articles_whole")
    row = partition_by_filter._is_divided(phase.connection, phase.params)
    assert (row.verdict, row.found[:25]) == ("PASS", "HASH (status), 3 partitions"[:25])
    partition_by_filter.retire(phase)
    assert articles.execute("SELECT to_regclass('articles_whole')").fetchone() == (None,)
    assert partition_by_filter.undo_plan(phase).statements == (), "the rollback ended"
    row_id = articles.execute("INSERT INTO articles (title) VALUES ('next') RETURNING id").fetchone()
    assert row_id and row_id[0] > 1000, "the identity goes on where it was"


class Killed(Exception):
    pass


def test_killed_anywhere_run_again_continues(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = ready(backfill={"batch_rows": 100, "most_batch_rows": 100})
    before = checksum(articles)

    def kill(module: Any, name: str, after: int) -> None:
        real, calls = getattr(module, name), [0]

        def dying(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > after:
                raise Killed(name)
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying)
            with pytest.raises(Killed):
                partition_by_filter.apply(phase)
                partition_by_filter.swap(phase)

    kill(partitioned_twin, "create_table", 0)
    kill(online_copy, "copy", 0)
    kill(throttle.Throttle, "wait", 4)
    copied = articles.execute("SELECT rows, copied FROM runbook.articles_move").fetchone()
    assert copied and 0 < copied[0] < before[0] and not copied[1]
    kill(building, "concurrently", 2)
    articles.execute("UPDATE articles SET views = 9 WHERE id < 50")
    kill(online_copy, "catch_up", 0)
    kill(online_copy, "apply_changes", 0)
    # In the swap itself: the transaction is gone with all that it did.
    statement = partitioned_twin.swap_statement(phase.connection, phase.params)
    broken = replace(statement, query=statement.query + psycopg.sql.SQL("; SELECT 1 / 0"))
    with pytest.raises(psycopg.errors.DivisionByZero), phase.opened():
        online_copy.swap(phase, partitioned_twin.move(phase.connection, phase.params), broken)
    assert (
        str(partitioned_twin.standing(phase.connection, phase.params))
        == "the ordinary table serves, the partitioned one is being filled"
    )
    partition_by_filter.apply(phase)
    assert partition_by_filter.verify_copy(phase).passed
    partition_by_filter.swap(phase)
    partition_by_filter.swap(phase)
    partition_by_filter.apply(phase)
    assert checksum(articles) == checksum(articles, "articles_whole")
    assert checksum(articles)[0] == before[0]


def test_a_pause_of_the_move_is_said_once_and_stands_in_the_ledger(
    ready: Callable[..., Phase],
    articles: psycopg.Connection[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_file = tmp_path / "stop"
    phase = ready(health={"stop_file": str(stop_file)}, partitioning=DIVIDE | {"most_rows_in_swap": 20})
    stop_file.touch()
    looks, look_at_health = count(1), health.look

    def look_until_the_third(*args: Any) -> list[health.Answer]:
        if next(looks) == 3:
            stop_file.unlink()
        return look_at_health(*args)

    monkeypatch.setattr(health, "look", look_until_the_third)
    partition_by_filter.apply(phase)
    said = capsys.readouterr().out.splitlines()
    assert [x for x in said if "paused" in x] == ["  paused: stop file: stop is there"]
    paused = [e["body"] for e in phase.ledger.entries() if e["kind"] == "pause"]
    assert [p["reason"] for p in paused] == ["stop file: stop is there"]
    assert 0 < paused[0]["seconds"] <= 20.0

    articles.execute("UPDATE articles SET views = 7 WHERE id <= 150")
    with phase.opened():
        assert online_copy.catch_up(phase, partitioned_twin.move(phase.connection, phase.params)) == 150
    said = [x for x in capsys.readouterr().out.splitlines() if "caught up" in x]
    assert (said[0], said[-1][:29]) == ("  150 rows to be caught up", "  150 rows (100 %) caught up,")
    assert online_copy.catch_up(phase, partitioned_twin.move(phase.connection, phase.params)) == 0
    assert "caught up" not in capsys.readouterr().out, "nothing to do is not worth a line"
    partition_by_filter.swap(phase)
    assert checksum(articles) == checksum(articles, "articles_whole")


def test_a_lost_row_is_found_and_named_and_undo_stops(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    partition_by_filter.apply(phase)
    articles.execute(
        "DELETE FROM articles_parts WHERE id = 10; UPDATE articles_parts SET views = 5 WHERE id IN (11, 12);"
        "INSERT INTO articles_parts (id, status) VALUES (999999, 'Draft')"
    )
    (failed,) = partition_by_filter.verify_copy(phase).failed
    rows = articles.execute("SELECT count(*) FROM articles").fetchone()
    assert rows is not None
    assert str(failed) == (
        'FAIL    partitioning.every_row_is_in_both   public.articles and "public"."articles_parts"\n'
        f"  found   {rows[0] + 1:,} rows compared, 1 lacking, 1 too many, 2 different\n"
        "  needed  every row in both, byte by byte, but for changes that wait in the queue\n"
        "  danger  rows would be lost, or come back, with the change of names\n"
        "  do      take the partitioned table away (partition_by_filter --undo), start again, report what differs"
    )
    partition_by_filter.undo(phase)
    partition_by_filter.apply(phase)
    partition_by_filter.swap(phase)
    articles.execute(
        "ALTER TABLE articles_whole DISABLE TRIGGER ALL; UPDATE articles_whole SET views = 3 WHERE id = 9"
    )
    with pytest.raises(GateFailed):
        partition_by_filter.undo(phase)
    assert (
        partitioned_twin.standing(phase.connection, phase.params).serves == "r"
        and partitioned_twin.standing(phase.connection, phase.params).parts
    ), "both are left to be looked at"


def test_more_changes_than_the_swap_may_take_are_applied_first(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = ready(partitioning=DIVIDE | {"most_rows_in_swap": 50})
    partition_by_filter.apply(phase)
    real, rounds = online_copy.catch_up, []

    def late(phase: Phase, move: Any, few: int | None = None) -> int:
        done = real(phase, move, few)
        if not rounds:
            articles.execute("UPDATE articles SET views = views + 1 WHERE id < 200")
        rounds.append(done)
        return done

    monkeypatch.setattr(online_copy, "catch_up", late)
    partition_by_filter.swap(phase)
    assert len(rounds) == 2 and rounds[1] >= 150
    figures = phase.ledger.latest("partition swap")
    assert figures is not None and figures["drained"] <= 50
    assert checksum(articles) == checksum(articles, "articles_whole")


def test_what_cannot_come_along_is_refused_by_name(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready(partitioning={"column": "status"})
    articles.execute(
        """
        CREATE TABLE notes (article bigint CONSTRAINT of_article REFERENCES articles);
        CREATE VIEW drafts AS SELECT id FROM articles;
        CREATE UNIQUE INDEX one_title ON articles (title, id);
        CREATE PUBLICATION told FOR TABLE articles;
        CREATE FUNCTION bound() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM articles; END;
        CREATE INDEX of_drafts ON articles USING hnsw (embedding vector_cosine_ops) WHERE status = 'Draft';
        ALTER TABLE articles DISABLE TRIGGER noted;
        ALTER TABLE articles ALTER COLUMN status DROP NOT NULL;
        """
    )
    failed = {g.name: g for g in partition_by_filter.check(phase).failed}
    assert list(failed) == [
        "partitioning.nothing_is_in_the_way",
        "partitioning.key_can_be_widened",
        "partitioning.wider_key_is_accepted",
    ]
    assert failed["partitioning.nothing_is_in_the_way"].found == (
        "foreign key of_article on notes; function bound to the table function bound();"
        " partial vector index (undo operate/serve_filters) of_drafts; publication told;"
        " trigger that is not enabled in the usual way noted; unique index one_title; view or rule _RETURN of drafts"
    )
    assert str(failed["partitioning.wider_key_is_accepted"]) == (
        "FAIL    partitioning.wider_key_is_accepted   public.articles\n"
        "  found   partitioning.accept_wider_key: false\n"
        "  needed  true: the primary key becomes (id, status)\n"
        "  danger  two rows of different status may then have one id; PostgreSQL refuses ON CONFLICT (id) and foreign"
        " keys to id alone\n"
        "  do      look for both in the application, then set partitioning.accept_wider_key: true"
    )
    assert failed["partitioning.key_can_be_widened"].found == "primary key id; status may be NULL"


def test_without_execute_and_without_a_column_nothing_is_done(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = replace(ready(), execute=False)
    names = [s.name for s in partition_by_filter.plan(phase)]
    assert names[:5] == [
        f"partitioning.{n}"
        for n in ("create_queue", "create_capture", "create_table", "create_triggers", "copy_batch")
    ]
    assert names[-2:] == ["partitioning.analyze", "partitioning.swap"] and "partitioning.create_index" in names
    assert len(partition_by_filter.expected(phase).rows) == 4
    partition_by_filter.apply(phase)
    partition_by_filter.swap(phase)
    assert partition_by_filter.verify_undone(phase).passed
    nothing = phase.params.model_copy(
        update={"partitioning": phase.params.partitioning.model_copy(update={"column": None})}
    )
    assert [g.name for g in partition_by_filter.check(replace(phase, params=nothing)).failed] == [
        "partitioning.column_is_named"
    ]


def test_the_notebook_does_it(articles: psycopg.Connection[Any], tmp_path: Path) -> None:
    many_rows(articles, TIMES)
    kept = {k: v for k, v in TARGET.items() if k != "tune"}
    path = write_params(tmp_path, **(SECTIONS | kept | {"partitioning": DIVIDE}))
    with pytest.raises(GateFailed) as raised:
        step("operate/partition_by_filter", path)
    assert [g.name for g in raised.value.gates.failed] == ["phase.predecessor_passed"]
    step_all("migrate", MIGRATE[:8], path)
    step("operate/partition_by_filter", path, execute=False)
    assert articles.execute("SELECT relkind FROM pg_class WHERE oid = 'articles'::regclass").fetchone() == ("r",)
    step("operate/partition_by_filter", path, times=2)
    assert articles.execute("SELECT relkind FROM pg_class WHERE oid = 'articles'::regclass").fetchone() == ("p",)
    step("operate/partition_by_filter", path)


def test_on_postgresql_16_whose_partitions_have_no_identity_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="rb-", ignore_cleanup_errors=True) as folder,
        servers.running("16.14 with 0.8.5", Path(folder) / "data") as dsn,
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        monkeypatch.setenv(DSN_ENV, dsn)
        toy.create_articles(connection, trigram=False)
        connection.execute("UPDATE articles SET status = 'Draft' WHERE id % 2 = 0")
        dressed(connection)
        sections = SECTIONS | {k: v for k, v in TARGET.items() if k != "tune"} | {"partitioning": DIVIDE}
        p = load_params(write_params(tmp_path, **sections))
        ledger = Ledger(db.connect(p, "test ledger"), p, "test-run", "operate/partition_by_filter")
        ledger.create()
        phase = gates_passed(Phase("operate/partition_by_filter", "test-run", True, p, db.connect(p, "test"), ledger))
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        before = look(connection)
        monkeypatch.setattr(partition_proof, "measure", lambda *_: None)
        partition_by_filter.apply(phase)
        assert partition_by_filter.verify_copy(phase).passed
        partition_by_filter.swap(phase)
        assert look(connection) == before
        last = connection.execute("SELECT max(id) FROM articles").fetchone()
        made = connection.execute("INSERT INTO articles (title) VALUES ('next') RETURNING id").fetchone()
        assert last and made and made[0] == last[0] + 1
        partition_by_filter.undo(phase)
        made = connection.execute("INSERT INTO articles (title) VALUES ('next') RETURNING id").fetchone()
        assert made and made[0] == last[0] + 2
        assert look(connection) == before and partition_by_filter.verify_undone(phase).passed
        phase.connection.close()
        ledger.connection.close()
