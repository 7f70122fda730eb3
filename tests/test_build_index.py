"""Phase 60 on an ordinary and a partitioned table: built, stopped anywhere, resumed, locked out, and gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.benchmark import explain
from runbook_lib.benchmark.prepared import Sent
from runbook_lib.core import db
from runbook_lib.core.gates import LockNotObtained, RunbookError
from runbook_lib.core.names import names
from runbook_lib.core.phase import Phase
from runbook_lib.indexes import building, index_proof, partitions, vector_index
from runbook_lib.indexes.building import BuildStep
from runbook_lib.migrate import build_index
from tests import partitioned

Filled = Callable[..., Phase]
LEAVES = ["articles_acme", "articles_bolt_0", "articles_bolt_1", "articles_rest"]
NEAREST = "SELECT id FROM articles ORDER BY embedding <=> $1 LIMIT $2"


@pytest.fixture
def parted(articles: psycopg.Connection[Any], filled: Filled) -> Filled:
    """Opens phase 60 on a table that is partitioned by tenants, one of them again, and has its vectors."""
    articles.execute("DROP TABLE articles")
    partitioned.create_articles(articles, "list")
    return filled


@pytest.fixture(params=["ordinary", "partitioned"])
def either(request: pytest.FixtureRequest, filled: Filled) -> Filled:
    """Opens phase 60 on a table of either kind."""
    return request.getfixturevalue("parted") if request.param == "partitioned" else filled  # type: ignore[no-any-return]


def _steps(phase: Phase) -> list[BuildStep]:
    return building.build_steps(phase.connection, build_index.index(phase.connection, phase.params))


def _names(phase: Phase) -> list[str]:
    return [f"{s.statement.name.split('.')[1]} {s.part.name}" for s in _steps(phase)]


def test_it_is_valid_has_its_class_and_finds_known_rows(either: Filled) -> None:
    phase = either()
    build_index.apply(phase)
    gates = build_index.verify(phase)
    assert gates.passed
    assert [g.name for g in gates] == [
        "index.is_valid",
        "index.has_the_right_operator_class",
        "index.was_built_without_warning",
        "index.finds_known_rows",
    ]
    assert build_index.plan(phase).statements == (), "built once, nothing is left to do"


def test_known_rows_of_a_large_table_come_from_a_sample_of_its_pages(
    filled: Filled, articles: psycopg.Connection[Any]
) -> None:
    phase = filled()
    build_index.apply(phase)
    n = names(phase.params) | {"vectors": names(phase.params)["table"]}
    pick = "SELECT id FROM articles {} WHERE embedding IS NOT NULL ORDER BY embedding_hash LIMIT 5"

    def picked(sampled: str) -> list[Any]:
        return [row[0] for row in articles.execute(pick.format(sampled)).fetchall()]  # type: ignore[arg-type]

    articles.execute("UPDATE pg_class SET reltuples = 2000 WHERE oid = 'articles'::regclass")
    quarter = 100 * index_proof.SAMPLED_FOR_ONE * 5 / 2000
    found = [row["key"] for row in index_proof.known_rows(phase.connection, phase.params, n, 5)]
    assert found == picked(f"TABLESAMPLE SYSTEM ({quarter}) REPEATABLE (1)") != picked("")
    articles.execute("UPDATE pg_class SET reltuples = 1e9 WHERE oid = 'articles'::regclass")
    assert [row["key"] for row in index_proof.known_rows(phase.connection, phase.params, n, 5)] == picked(""), (
        "too few in the sample"
    )


@pytest.mark.parametrize(
    ("vector", "options"),
    [
        ({"type": "halfvec"}, {}),
        ({"distance": "l2"}, {}),
        ({"distance": "inner_product"}, {"m": 8, "ef_construction": 20}),
        ({}, {"method": "ivfflat", "lists": 4}),
    ],
)
def test_types_distances_and_methods(filled: Filled, vector: dict[str, Any], options: dict[str, Any]) -> None:
    phase = filled(vector=vector, index=options)
    build_index.apply(phase)
    gates = {g.name: g.verdict for g in build_index.verify(phase)}
    assert gates["index.has_the_right_operator_class"] == "PASS"
    assert gates["index.is_valid"] == "PASS"


def test_no_index_says_so(filled: Filled) -> None:
    assert str(build_index.verify(filled())) == (
        "FAIL    index.is_valid   articles_embedding_hnsw on public.articles\n"
        "  found   no such index\n"
        "  needed  valid\n"
        "  danger  every search reads the whole table\n"
        "  do      run 60_build_index with execute: true"
    )


def test_what_an_interrupted_build_left_is_named_dropped_and_built_anew(
    filled: Filled, database: str, articles: psycopg.Connection[Any]
) -> None:
    phase = filled()
    with psycopg.connect(database) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM articles")
        failed: list[BaseException] = []

        def build() -> None:
            try:
                build_index.apply(phase)
            except psycopg.errors.QueryCanceled as error:
                failed.append(error)

        builder = threading.Thread(target=build)
        builder.start()
        cancelled = False
        for _ in range(100):
            time.sleep(0.1)
            row = articles.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_progress_create_index WHERE phase LIKE '%old snapshots%'"
            ).fetchone()
            if row:
                cancelled = True
                break
        builder.join(30)
        assert cancelled and failed
    assert str(build_index.verify(phase)) == (
        "FAIL    index.is_valid   articles_embedding_hnsw on public.articles\n"
        "  found   invalid (an earlier concurrent build did not finish)\n"
        "  needed  valid\n"
        "  danger  no query can use it, yet every write still pays for it\n"
        "  do      run 60_build_index again with execute: true; it drops this index concurrently and builds it again"
    )
    assert [s.name for s in build_index.plan(phase)] == ["index.drop", "index.create_hnsw"]
    build_index.apply(phase)
    assert build_index.verify(phase).passed


def test_too_little_memory_fails_the_gate(either: Filled, articles: psycopg.Connection[Any]) -> None:
    phase = either()
    build_index.apply(phase)
    phase.note("index", {"notices": ["hnsw graph no longer fits into maintenance_work_mem after 12 tuples"]})
    assert [g.name for g in build_index.verify(phase).failed] == ["index.was_built_without_warning"]


def test_an_index_of_another_class_fails_the_gate(either: Filled, articles: psycopg.Connection[Any]) -> None:
    phase = either()
    articles.execute("CREATE INDEX articles_embedding_hnsw ON articles USING hnsw (embedding vector_l2_ops)")
    wrong, one = build_index.verify(phase).failed[0], "hnsw with vector_l2_ops on embedding"
    each = f"{one} on public.articles, {one} on public.articles_acme, {one} on public.articles_bolt and 3 more"
    assert (wrong.name, wrong.found) == (
        "index.has_the_right_operator_class",
        each if partitioned.leaves(articles) else one,
    )


def test_what_an_event_trigger_raises_is_told_in_its_own_words(
    filled: Filled, articles: psycopg.Connection[Any]
) -> None:
    phase = filled()
    articles.execute(
        """CREATE FUNCTION frozen() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'DDL is frozen'; END $$;
        CREATE EVENT TRIGGER frozen ON ddl_command_start WHEN tag IN ('CREATE INDEX') EXECUTE FUNCTION frozen()"""
    )
    with pytest.raises(psycopg.errors.RaiseException, match="DDL is frozen"):
        build_index.apply(phase)


def test_undo_drops_it_and_twice_does_nothing(either: Filled) -> None:
    phase = either()
    build_index.apply(phase)
    build_index.undo(phase)
    assert build_index.verify_undone(phase).passed
    assert build_index.undo_plan(phase).statements == ()


def test_old_transactions_are_shown_before_the_build(filled: Filled, database: str) -> None:
    phase = filled()
    with psycopg.connect(database, application_name="a long report") as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM articles")
        time.sleep(1.2)
        assert "a long report" in str(build_index.in_the_way(phase))


def test_the_builds_settings_stay_in_its_own_session(filled: Filled) -> None:
    phase = filled()
    build_index.apply(phase)
    with db.connect(phase.params, "another") as other:
        assert other.execute("SHOW maintenance_work_mem").fetchone() == {"maintenance_work_mem": "64MB"}
    assert phase.connection.execute("SHOW lock_timeout").fetchone() == {"lock_timeout": "100ms"}


def test_each_partition_is_built_and_attached_and_the_whole_is_proved(
    parted: Filled, articles: psycopg.Connection[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    phase = parted()
    assert _names(phase) == [
        "create_bracket_hnsw articles",
        "create_bracket_hnsw articles_bolt",
        "attach articles_bolt",
        *(f"{what} {leaf}" for leaf in ("articles_acme", "articles_rest") for what in ("create_hnsw", "attach")),
        *(f"{what} {leaf}" for leaf in ("articles_bolt_0", "articles_bolt_1") for what in ("create_hnsw", "attach")),
    ]
    build_index.apply(phase)
    gates = {g.name: g for g in build_index.verify(phase)}
    assert all(g.verdict == "PASS" for g in gates.values())
    assert gates["index.is_valid"].found.startswith("valid, on each of 4 partitions, ")
    assert (
        gates["index.has_the_right_operator_class"].found == "hnsw with vector_cosine_ops on embedding, on each of 6"
    )
    assert gates["index.finds_known_rows"].found == "20 of 20 rows found by their own vector"
    assert build_index.plan(phase).statements == ()
    assert "partition 2 of 4, public.articles_rest, about 100 rows" in capsys.readouterr().out
    noted = phase.ledger.latest("index")
    assert noted is not None and (noted["name"], noted["partitions"]) == ("articles_embedding_hnsw", 4)
    stored = articles.execute(
        "SELECT sum(pg_relation_size(i.indexrelid)) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_am m ON m.oid = c.relam WHERE m.amname = 'hnsw'"
    ).fetchone()
    assert stored == (noted["bytes"],)


def test_killed_between_two_partitions_it_goes_on_with_the_next(
    parted: Filled, articles: psycopg.Connection[Any]
) -> None:
    phase = parted()
    with partitioned.killed_after(building, builds=2):
        build_index.apply(phase)
    assert str(build_index.verify(phase)) == (
        "FAIL    index.is_valid   articles_embedding_hnsw on public.articles\n"
        "  found   invalid: public.articles_bolt_0 has none, public.articles_bolt_1 has none; of 4 partitions\n"
        "  needed  valid, with a valid index on every partition\n"
        "  danger  every search reads the partitions that lack theirs whole, yet every write pays for the others\n"
        "  do      run 60_build_index again with execute: true; it continues with the partitions that lack theirs"
    )
    built = {row[0] for row in articles.execute("SELECT oid FROM pg_class WHERE relname LIKE '%_embedding_hnsw'")}
    assert _names(phase)[0] == "create_hnsw articles_bolt_0"
    build_index.apply(phase)
    assert build_index.verify(phase).passed
    kept = {row[0] for row in articles.execute("SELECT oid FROM pg_class WHERE relname LIKE '%_embedding_hnsw'")}
    assert built < kept, "what was built before stays as it is"
    noted = [e["body"] for e in phase.ledger.entries() if e["kind"] == "partition_index"]
    assert len(noted) == 4
    whole = phase.ledger.latest("index")
    assert whole is not None and whole["seconds"] == pytest.approx(sum(n["seconds"] for n in noted), abs=0.002)


def test_what_a_cancelled_build_left_on_a_partition_is_dropped_and_built_anew(
    parted: Filled, database: str, articles: psycopg.Connection[Any]
) -> None:
    phase, failed = parted(), list[BaseException]()

    def build() -> None:
        try:
            build_index.apply(phase)
        except psycopg.errors.QueryCanceled as error:
            failed.append(error)

    with psycopg.connect(database) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM articles")
        builder = threading.Thread(target=build)
        builder.start()
        until = time.monotonic() + 20
        while not failed and time.monotonic() < until:
            articles.execute(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_progress_create_index WHERE phase LIKE '%old snapshots%'"
            )
            time.sleep(0.1)
        builder.join(30)
    assert failed
    assert partitioned.index_state(articles)["articles_acme_embedding_hnsw"] == (False, False)
    assert "that of public.articles_acme is invalid" in str(build_index.verify(phase))
    assert _names(phase)[:3] == ["drop articles_acme", "create_hnsw articles_acme", "attach articles_acme"]
    build_index.apply(phase)
    assert build_index.verify(phase).passed


def test_partitions_that_appear_or_go_while_it_is_built_are_taken_and_passed_over(
    parted: Filled, articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase, real = parted(), building.concurrently
    articles.execute("CREATE TABLE articles_gone PARTITION OF articles FOR VALUES IN ('gone')")

    def concurrently(phase: Phase, statement: db.Statement, index: str = "") -> Any:
        articles.execute(
            "DROP TABLE IF EXISTS articles_gone; CREATE TABLE IF NOT EXISTS articles_meanwhile PARTITION OF articles"
            " FOR VALUES IN ('meanwhile')"
        )
        return real(phase, statement, index)

    with monkeypatch.context() as patch:
        patch.setattr(building, "concurrently", concurrently)
        table = str(build_index.apply(phase))
    assert "gone meanwhile, passed over" in table
    articles.execute("CREATE TABLE articles_after PARTITION OF articles FOR VALUES IN ('after')")
    articles.execute("INSERT INTO articles (tenant, title) VALUES ('after', 'a row of a new partition')")
    now = build_index.index(phase.connection, phase.params)
    assert {p.name for p in now.leaves} == {*LEAVES, "articles_meanwhile", "articles_after"}
    assert now.usable and build_index.verify(phase).passed
    queued = articles.execute("SELECT count(*) FROM runbook.articles_queue").fetchone()
    assert queued == (1,), "the capture is on the new partition too"
    build_index.undo(phase)
    assert partitioned.index_state(articles) == {}


def _locks(articles: psycopg.Connection[Any], statement: db.Statement) -> set[tuple[str, str]]:
    """Locks on the table's relations that a statement still has at its end, apart from the weakest."""
    with articles.transaction(force_rollback=True):
        articles.execute(statement.query)
        found = articles.execute(
            "SELECT c.relname, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation"
            " WHERE l.pid = pg_backend_pid() AND c.relname LIKE 'articles%' AND l.mode <> 'AccessShareLock'"
        ).fetchall()
    return {(name, mode) for name, mode in found}


def test_each_statement_takes_the_locks_that_its_plan_says(parted: Filled, articles: psycopg.Connection[Any]) -> None:
    phase = parted()
    bracket = _steps(phase)[0].statement
    assert bracket.lock == "SHARE on public.articles alone, for milliseconds"
    tables = {"articles", "articles_bolt", *LEAVES}
    assert {lock for lock in _locks(articles, bracket) if lock[0] in tables} == {("articles", "ShareLock")}

    for step in _steps(phase)[:3]:
        phase.do(step.statement)
    building.concurrently(phase, _steps(phase)[0].statement)
    attach = _steps(phase)[0].statement
    assert attach.name == "index_partitions.attach"
    assert attach.lock.startswith("ACCESS EXCLUSIVE on the index of public.articles_acme")
    assert _locks(articles, attach) == {
        ("articles_embedding_hnsw", "ShareUpdateExclusiveLock"),
        ("articles_acme_embedding_hnsw", "AccessExclusiveLock"),
    }
    build_index.apply(phase)
    drop = build_index.undo_plan(phase).statements
    assert [s.name for s in drop] == ["index_partitions.drop_bracket"]
    assert drop[0].lock == "ACCESS EXCLUSIVE on public.articles and every partition of it, for milliseconds"
    held = {lock for lock in _locks(articles, drop[0]) if lock[0] in tables}
    assert held >= {(table, "AccessExclusiveLock") for table in tables}


def test_undo_waits_for_nobody_names_who_reads_a_partition_and_twice_does_nothing(
    parted: Filled, database: str, articles: psycopg.Connection[Any]
) -> None:
    phase = parted()
    build_index.apply(phase)
    with psycopg.connect(database, application_name="a long report") as reader:
        reader.execute("SELECT count(*) FROM articles_bolt_1")
        with pytest.raises(LockNotObtained) as caught:
            build_index.undo(phase)
        assert "a long report" in str(caught.value) and "AccessShareLock" in str(caught.value)
    assert build_index.verify(phase).passed, "it serves on"
    build_index.undo(phase)
    assert build_index.verify_undone(phase).passed
    assert partitioned.index_state(articles) == {}
    assert build_index.undo_plan(phase).statements == ()


def test_undo_of_a_half_built_index_takes_what_was_never_attached(
    parted: Filled, articles: psycopg.Connection[Any]
) -> None:
    phase = parted()
    with partitioned.killed_after(building, builds=2):
        build_index.apply(phase)
    articles.execute(
        "CREATE INDEX articles_bolt_0_embedding_hnsw ON articles_bolt_0 USING hnsw (embedding vector_l2_ops)"
    )
    assert "articles_bolt_0 is not attached" in str(build_index.verify(phase))
    assert not build_index.verify_undone(phase).passed
    build_index.undo(phase)
    assert build_index.verify_undone(phase).passed
    assert partitioned.index_state(articles) == {}


def test_ivfflat_lists_follow_the_rows_of_each_partition(
    parted: Filled, articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runbook_lib.indexes.forecast.ROWS_A_LIST", 10)
    phase = parted(index={"method": "ivfflat"})
    build_index.apply(phase)
    found = {g.name: g for g in build_index.verify(phase)}
    assert found["index.is_valid"].verdict == "PASS"
    options = dict(
        articles.execute("SELECT relname, reloptions FROM pg_class WHERE relname LIKE '%ivfflat'").fetchall()
    )
    rows = {leaf: articles.execute(f"SELECT count(embedding) FROM {leaf}").fetchone() for leaf in LEAVES}
    assert {leaf: options[f"{leaf}_embedding_ivfflat"] for leaf in LEAVES} == {
        leaf: [f"lists={n[0] // 10}"] for leaf, n in rows.items() if n
    }


def test_a_long_name_is_cut_and_stays_its_own(parted: Filled, articles: psycopg.Connection[Any]) -> None:
    phase = parted()
    long = "articles_of_the_tenant_with_the_longest_name_of_all_in_the_"
    for end in ("a", "b"):
        articles.execute(f"CREATE TABLE {long}{end} PARTITION OF articles FOR VALUES IN ('{end}')")
    parts = partitions.tree(phase.connection, phase.params, "articles")
    named = {vector_index.planned_name(phase.params, p) for p in parts if p.name.startswith(long)}
    assert len(named) == 2 and all(len(n.encode()) <= 63 and n.endswith("_embedding_hnsw") for n in named)
    build_index.apply(phase)
    assert build_index.verify(phase).passed


def test_a_plan_that_merges_every_partitions_index_is_good_and_one_that_lacks_one_is_named(
    parted: Filled, articles: psycopg.Connection[Any]
) -> None:
    phase = parted()
    build_index.apply(phase)
    articles.execute("ANALYZE articles")
    sent = Sent("the application's query", NEAREST, ("embedding", "k"), ("[1,2,3,4,5,6,7,8]", 10))

    def judged(connection: db.Connection) -> str:
        return str(explain.judge(connection, phase.params, sent, "custom"))

    with db.rolled_back(phase.connection):
        phase.connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
        found = judged(phase.connection)
        assert found.startswith("PASS") and "Merge Append of 4 index scans" in found
        phase.connection.execute("SET LOCAL enable_seqscan = on")
        phase.connection.execute("ALTER TABLE articles DETACH PARTITION articles_rest")
        phase.connection.execute("DROP INDEX articles_rest_embedding_hnsw")
        phase.connection.execute("DROP INDEX articles_embedding_hnsw")
        for leaf in ("articles_acme", "articles_bolt_0", "articles_bolt_1"):
            phase.connection.execute(f"CREATE INDEX ON {leaf} USING hnsw (embedding vector_cosine_ops)")  # type: ignore[arg-type]
        phase.connection.execute("ALTER TABLE articles ATTACH PARTITION articles_rest DEFAULT")
        assert judged(phase.connection).endswith(
            "no vector index on public.articles_rest\n"
            "  needed  Index Scan articles_embedding_hnsw\n"
            "  danger  every search would read the whole table\n"
            "  do      run 60_build_index with execute: true; it builds what these partitions lack"
        )


def test_a_name_that_something_else_has_is_said(either: Filled, articles: psycopg.Connection[Any]) -> None:
    phase = either()
    articles.execute("CREATE TABLE articles_embedding_hnsw ()")
    with pytest.raises(RunbookError) as raised:
        build_index.apply(phase)
    assert str(raised.value) == (
        '\n  found   relation "articles_embedding_hnsw" already exists\n'
        "  needed  articles_embedding_hnsw free in schema public\n"
        "  danger  the index cannot be built; what was built before stays\n"
        "  do      rename or drop what has this name, then run this again"
    )
    articles.execute("DROP TABLE articles_embedding_hnsw")
    build_index.apply(phase)
    assert build_index.verify(phase).passed


def test_an_invalid_parent_above_valid_partitions_is_dropped_and_built_anew(
    parted: Filled, articles: psycopg.Connection[Any]
) -> None:
    phase = parted()
    build_index.apply(phase)
    articles.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'articles_embedding_hnsw'::regclass")
    assert "invalid: the index of the parent; of 4 partitions" in str(build_index.verify(phase))
    assert [s.name for s in build_index.plan(phase)][:2] == [
        "index_partitions.drop_bracket",
        "index_partitions.create_bracket_hnsw",
    ]
    build_index.apply(phase)
    assert build_index.verify(phase).passed
