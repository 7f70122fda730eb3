"""The index built again, of an ordinary and a partitioned table: beside the one that serves, proved, swapped;
interrupted anywhere, and rolled back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.benchmark import index_recall
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.gates import GateFailed, LockNotObtained
from runbook_lib.core.phase import Phase, open_phase
from runbook_lib.core.registry import MIGRATE
from runbook_lib.indexes import building
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.operate import rebuild_index
from runbook_lib.params import Params
from runbook_lib.search import search_function
from tests import partitioned
from tests.conftest import write_params
from tests.stepping import step, step_all
from tests.test_partitions import SECTIONS as OF_PARTITIONS
from tests.test_server_versions import SECTIONS

Open = Callable[..., Phase]
DENSER = {"m": 24, "ef_construction": 96}


LEAVES = ("articles_acme", "articles_bolt_0", "articles_bolt_1", "articles_rest")


@pytest.fixture
def built(open_phase: Open) -> Callable[..., Phase]:
    """Opens the operation on a table whose index has the options of the first parameters."""

    def make(options: dict[str, Any] | None = None, first: dict[str, Any] | None = None, **sections: Any) -> Phase:
        phase = open_phase("60_build_index", **sections, **({"index": first} if first else {}))
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        return open_phase("operate/rebuild_index", index=DENSER if options is None else options, **sections)

    return make


@pytest.fixture
def parted(articles: psycopg.Connection[Any], built: Callable[..., Phase]) -> Callable[..., Phase]:
    """The same on a table that is partitioned by tenants, one of them again."""
    articles.execute("DROP TABLE articles")
    partitioned.create_articles(articles, "list")
    return built


@pytest.fixture(params=["ordinary", "partitioned"])
def either(request: pytest.FixtureRequest, built: Callable[..., Phase]) -> Callable[..., Phase]:
    """The same on a table of either kind."""
    return request.getfixturevalue("parted") if request.param == "partitioned" else built  # type: ignore[no-any-return]


def indexes(connection: psycopg.Connection[Any]) -> dict[str, tuple[bool, list[str] | None]]:
    """Name, validity and options of the vector indexes of the table itself; those of its partitions are like them."""
    found = connection.execute(
        "SELECT c.relname, i.indisvalid, c.reloptions, array(SELECT DISTINCT p.reloptions::text"
        "     FROM pg_partition_tree(c.oid) t JOIN pg_class p ON p.oid = t.relid) FROM pg_index i"
        " JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam"
        " WHERE a.amname IN ('hnsw', 'ivfflat') AND i.indrelid = 'articles'::regclass ORDER BY 1"
    ).fetchall()
    assert all(len(of_partitions) <= 1 for *_, of_partitions in found)
    return {name: (valid, options) for name, valid, options, _ in found}


def names(connection: psycopg.Connection[Any]) -> dict[str, int]:
    """Every vector index of the table and its partitions, by name, with its oid."""
    found = connection.execute(
        "SELECT c.relname, c.oid::bigint FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE a.amname = 'hnsw'"
    )
    return dict(found.fetchall())


def kinds(plan: Iterable[db.Statement]) -> list[str]:
    """The names of its statements; a drop or a build of either kind of table by one name, attaching left out."""
    of_both = {"index_partitions.drop_bracket": "rebuild.drop", "index_partitions.create_bracket_hnsw": ""}
    found = (of_both.get(s.name, s.name) for s in plan if s.name != "index_partitions.attach")
    return [name for name, _ in groupby(name for name in found if name)]


NEW = {"articles_embedding_hnsw": (True, ["m=24", "ef_construction=96"])}
BEFORE = {"articles_embedding_hnsw": (True, ["m=16", "ef_construction=64"])}


def test_other_options_are_proved_before_the_old_index_goes(
    either: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = either()
    assert rebuild_index.check(phase).passed
    assert kinds(rebuild_index.plan(phase)) == ["index.create_hnsw", "rebuild.swap", "rebuild.drop"]
    rebuild_index.apply(phase)
    assert indexes(articles) == BEFORE | {"articles_embedding_hnsw_new": (True, ["m=24", "ef_construction=96"])}
    gates = rebuild_index.verify_new(phase)
    assert [(g.name, str(g.verdict)) for g in gates] == [
        ("rebuild.new_index_is_valid", "PASS"),
        ("rebuild.new_index_finds_as_much", "PASS"),
    ]
    assert gates.gates[1].figures["before"] >= 0.9 <= gates.gates[1].figures["after"]
    rebuild_index.swap(phase)
    assert indexes(articles) == NEW
    assert rebuild_index.verify(phase).passed
    assert rebuild_index.plan(phase).statements == (), "in the same run nothing is left to do"
    assert rebuild_index.verify_new(phase).passed, "nor to prove"


def test_each_index_is_measured_with_the_other_hidden_and_both_stay(
    either: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = either()
    rebuild_index.apply(phase)
    asked = index_recall.questions(phase.connection, phase.params)
    names = ["articles_embedding_hnsw", "articles_embedding_hnsw_new"]
    for name, other in (names, names[::-1]):
        measured = index_recall.through(phase.connection, phase.params, asked, name, [other])
        assert measured and (measured.index, measured.queries) == (name, 20)
    assert list(indexes(articles)) == names
    assert index_recall.through(phase.connection, phase.params, asked, "no such index", []) is None


def test_an_index_that_finds_less_is_not_put_into_place(
    either: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = either()
    rebuild_index.apply(phase)
    real = index_recall.through

    def poor(
        connection: db.Connection, params: Params, asked: list[Query], index: str, others: list[str]
    ) -> index_recall.IndexRecall | None:
        found = real(connection, params, asked, index, others)
        return replace(found, recall=0.5) if found and index.endswith("_new") else found

    monkeypatch.setattr(index_recall, "through", poor)
    (failed,) = rebuild_index.verify_new(phase).failed
    was = failed.found.split("before recall ")[1][:5]
    needed = min(0.95, float(was))
    assert str(failed) == (
        "FAIL    rebuild.new_index_finds_as_much   articles_embedding_hnsw_new\n"
        "  found   recall 0.500 on 20 queries, 0 short of rows;"
        f" before recall {was} on 20 queries, 0 short of rows\n"
        f"  needed  recall {needed:.3f}, no more queries short of rows than before\n"
        "  danger  the index would hide answers that exact search finds, and that the one before found\n"
        "  do      build with a higher ef_construction or m in index; nothing else has changed"
    )
    rebuild_index.undo(phase)
    assert indexes(articles) == BEFORE


@pytest.mark.parametrize(
    ("left", "plan"),
    [
        ("new", ["rebuild.swap", "rebuild.drop"]),
        ("invalid new", ["rebuild.drop", "index.create_hnsw", "rebuild.swap", "rebuild.drop"]),
        ("new of other options", ["rebuild.drop", "index.create_hnsw", "rebuild.swap", "rebuild.drop"]),
        ("old", ["rebuild.drop"]),
        ("ccnew", ["rebuild.drop", "index.create_hnsw", "rebuild.swap", "rebuild.drop"]),
        ("ccold1", ["rebuild.drop", "index.create_hnsw", "rebuild.swap", "rebuild.drop"]),
    ],
)
def test_interrupted_anywhere_a_rerun_goes_on(
    either: Callable[..., Phase], articles: psycopg.Connection[Any], left: str, plan: list[str]
) -> None:
    phase = either()
    name = f"articles_embedding_hnsw_{left.split()[-1] if 'other' not in left else 'new'}"
    if left == "old":
        articles.execute(f"ALTER INDEX articles_embedding_hnsw RENAME TO {name}")
        name = "articles_embedding_hnsw"
    options = "m = 4, ef_construction = 8" if "other" in left else "m = 24, ef_construction = 96"
    articles.execute(f"CREATE INDEX {name} ON articles USING hnsw (embedding vector_cosine_ops) WITH ({options})")
    if left.startswith(("invalid", "cc")):
        articles.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", [name])
    assert kinds(rebuild_index.plan(phase)) == plan
    rebuild_index.apply(phase)
    assert rebuild_index.verify_new(phase).passed
    rebuild_index.swap(phase)
    assert indexes(articles) == NEW
    assert rebuild_index.verify(phase).failed == ()


def test_killed_in_the_build_the_old_index_serves_and_the_rerun_clears(
    built: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = built()
    real = building.SQL["settings"]
    # A statement timeout stands for whatever ends a build half-way.
    text = real.text.replace(
        "set_config('statement_timeout', '0', false)", "set_config('statement_timeout', '1', false)"
    )
    articles.execute("INSERT INTO articles (title, body) SELECT title, body FROM articles, generate_series(1, 20)")
    articles.execute(
        "UPDATE articles SET embedding = (SELECT embedding FROM articles WHERE id = 1) WHERE embedding IS NULL"
    )
    with monkeypatch.context() as patch:
        patch.setitem(building.SQL, "settings", replace(real, text=text))
        with pytest.raises(psycopg.errors.QueryCanceled):
            rebuild_index.apply(phase)
    assert indexes(articles)["articles_embedding_hnsw"] == BEFORE["articles_embedding_hnsw"]
    assert indexes(articles).get("articles_embedding_hnsw_new", (False,))[0] is False
    rebuild_index.apply(phase)
    rebuild_index.swap(phase)
    assert indexes(articles) == NEW


def test_a_running_build_is_no_leftover(either: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch) -> None:
    phase = either()
    found = [
        replace(s, own={oid: replace(own, builds_under_way=1) for oid, own in s.own.items()})
        for s in rebuild_index.standing(phase.connection, phase.params)
    ]
    monkeypatch.setattr(rebuild_index, "standing", lambda *_: found)
    assert str(rebuild_index.check(phase).failed[0]) == (
        "FAIL    rebuild.no_build_is_under_way   articles_embedding_hnsw on public.articles\n"
        "  found   1 builds at work on this table\n"
        "  needed  none\n"
        "  danger  the two would wait for each other, and what looks left over may be at work\n"
        "  do      wait for it: SELECT * FROM pg_stat_progress_create_index;"
    )


def test_a_whole_index_of_such_a_name_is_somebodys(
    either: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = either()
    articles.execute("CREATE INDEX mine_ccnew ON articles USING hnsw (embedding vector_cosine_ops)")
    assert {s.name: s.role for s in rebuild_index.standing(phase.connection, phase.params)}["mine_ccnew"] == "other"
    assert "rebuild.drop" not in [
        s.name for s in rebuild_index.building_plan(phase.connection, phase.ledger, phase.params)
    ]


@pytest.mark.parametrize("so_far", ["built", "swapped", "done"])
def test_undo_from_anywhere_leads_back_to_the_index_that_served(
    either: Callable[..., Phase], articles: psycopg.Connection[Any], so_far: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = either()
    rebuild_index.apply(phase)
    if so_far == "swapped":
        # The old index is still there: the drop has not come to its turn.
        phase.do(rebuild_index.swapping_plan(phase.connection, phase.ledger, phase.params).statements[0])
        phase.note("rebuild", {"run_id": phase.run_id, "before": {"m": 16, "ef_construction": 64}})
    elif so_far == "done":
        rebuild_index.swap(phase)
    rebuild_index.undo(phase)
    assert indexes(articles) == BEFORE
    if so_far != "built":
        assert rebuild_index.verify_undone(phase).passed
    assert rebuild_index.undo_plan(phase).statements == (), "twice does nothing"


def test_an_aged_index_of_the_same_options_is_built_anew(
    either: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = either(options={})
    was = rebuild_index.standing(phase.connection, phase.params)[0].oid
    rebuild_index.apply(phase)
    rebuild_index.swap(phase)
    assert indexes(articles) == BEFORE
    assert rebuild_index.standing(phase.connection, phase.params)[0].oid != was


def test_ivfflat_lists(built: Callable[..., Phase], articles: psycopg.Connection[Any], open_phase: Open) -> None:
    first = open_phase("60_build_index", index={"method": "ivfflat", "lists": 4})
    for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(first)
    phase = open_phase("operate/rebuild_index", index={"method": "ivfflat", "lists": 8})
    rebuild_index.apply(phase)
    assert rebuild_index.verify_new(phase).gates[0].verdict == "PASS"
    rebuild_index.swap(phase)
    assert indexes(articles) == {"articles_embedding_ivfflat": (True, ["lists=8"])}


def test_without_execute_nothing_is_built(either: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = replace(either(), execute=False)
    assert kinds(rebuild_index.building_plan(phase.connection, phase.ledger, phase.params)) == ["index.create_hnsw"]
    assert len(rebuild_index.apply(phase).rows) == len(
        rebuild_index.building_plan(phase.connection, phase.ledger, phase.params).statements
    )
    assert len(rebuild_index.swap(phase).rows) == 2
    assert indexes(articles) == BEFORE


def test_the_notebook_does_it_and_refuses_before_there_is_an_index(
    articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    with pytest.raises(GateFailed) as raised:
        step("operate/rebuild_index", write_params(tmp_path, **SECTIONS))
    assert [g.name for g in raised.value.gates.failed] == ["phase.predecessor_passed"]
    step_all("migrate", MIGRATE[:8], write_params(tmp_path, **SECTIONS))
    path = write_params(tmp_path, **SECTIONS, index=DENSER)
    step("operate/rebuild_index", path, execute=False)
    assert indexes(articles) == BEFORE
    step("operate/rebuild_index", path)
    assert indexes(articles) == NEW
    verdicts = articles.execute(
        "SELECT body->>'verdict' FROM runbook.entry"
        " WHERE kind = 'phase' AND phase = 'operate/rebuild_index' ORDER BY seq"
    ).fetchall()
    assert verdicts == [("PASS",)]


def _opened(path: Path, run_id: str) -> Phase:
    phase = open_phase("operate/rebuild_index", str(path), run_id, True)
    phase.require()
    return phase


def _close(phase: Phase) -> None:
    phase.end("was ended by the test", "nothing")


@pytest.fixture
def migrated(articles: psycopg.Connection[Any], tmp_path: Path) -> Callable[..., Path]:
    """A partitioned table whose index is built; returns the params file, rewritten with other options."""
    articles.execute("DROP TABLE articles")
    partitioned.create_articles(articles, "list")
    step_all("migrate", MIGRATE[:7], write_params(tmp_path, **OF_PARTITIONS))
    return lambda **index: write_params(tmp_path, **OF_PARTITIONS, index=index)


def test_the_notebook_builds_each_partition_anew_with_other_options_and_undo_brings_the_former_ones(
    migrated: Callable[..., Path], articles: psycopg.Connection[Any]
) -> None:
    before = names(articles)
    path = migrated(m=8, ef_construction=32)
    step("operate/rebuild_index", path)
    after = names(articles)
    assert before.keys() == after.keys() and len(after) == 6
    assert indexes(articles) == {"articles_embedding_hnsw": (True, ["m=8", "ef_construction=32"])}
    assert not set(before.values()) & set(after.values())
    articles.execute("CREATE TABLE articles_later PARTITION OF articles FOR VALUES IN ('later')")
    assert indexes(articles)["articles_embedding_hnsw"] == (True, ["m=8", "ef_construction=32"])
    step("undo/rebuild_index", path)
    assert indexes(articles) == BEFORE, "the partition that came since has the former options too"
    assert set(partitioned.index_state(articles).values()) == {(True, False), (True, True)}


@pytest.mark.parametrize("builds", [0, 1, 2, 3])
def test_killed_between_two_partitions_another_run_goes_on_and_undo_leads_back(
    migrated: Callable[..., Path], articles: psycopg.Connection[Any], builds: int
) -> None:
    was, path = names(articles), migrated(m=8, ef_construction=32)
    phase = _opened(path, "first")
    assert kinds(rebuild_index.plan(phase)) == ["index.create_hnsw", "rebuild.swap", "rebuild.drop"]
    with partitioned.killed_after(building, builds=builds):
        rebuild_index.apply(phase)
    lacking = [f"public.{leaf}" for leaf in ("articles_acme", "articles_rest", *LEAVES[1:3])][builds:]
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    assert str(rebuild_index.verify_new(phase)) == (
        "FAIL    rebuild.new_index_is_valid   articles_embedding_hnsw_new\n"
        f"  found   invalid: {', '.join(f'{leaf} has none' for leaf in lacking[:3])}{more}; of 4 partitions\n"
        "  needed  valid\n"
        "  danger  nothing can take the place of the index that serves, yet every write pays for what is there\n"
        "  do      run operate/rebuild_index again with execute: true; it drops what is left and builds it again"
    )
    with pytest.raises(GateFailed):
        phase.prove(rebuild_index.verify_new)
    _close(phase)
    # What a REINDEX CONCURRENTLY leaves when it is cancelled.
    articles.execute(
        "CREATE INDEX articles_rest_embedding_hnsw_ccnew ON articles_rest USING hnsw (embedding vector_l2_ops)"
    )
    articles.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'articles_rest_embedding_hnsw_ccnew'::regclass"
    )

    phase, half = _opened(path, "second"), names(articles)
    assert [s.name for s in rebuild_index.building_plan(phase.connection, phase.ledger, phase.params)] == [
        "rebuild.drop",
        *["index.create_hnsw", "index_partitions.attach"] * (4 - builds),
    ]
    rebuild_index.apply(phase)
    assert {oid for name, oid in half.items() if name.endswith("_new")} <= set(names(articles).values())
    gates = rebuild_index.verify_new(phase)
    assert gates.passed and [g.name for g in gates][-1] == "rebuild.new_index_finds_as_much"
    rebuild_index.swap(phase)
    assert rebuild_index.verify(phase).passed
    assert rebuild_index.plan(phase).statements == ()
    assert names(articles).keys() == was.keys()
    rebuild_index.undo(phase)
    assert rebuild_index.verify_undone(phase).passed
    assert indexes(articles) == BEFORE and names(articles).keys() == was.keys()
    assert rebuild_index.undo_plan(phase).statements == ()
    _close(phase)


def test_undo_of_a_half_built_new_index_and_killed_in_the_way_back(
    parted: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase, was = parted(), names(articles)
    with partitioned.killed_after(building, builds=2):
        rebuild_index.apply(phase)
    articles.execute(
        "CREATE INDEX articles_bolt_0_embedding_hnsw_new ON articles_bolt_0 USING hnsw (embedding vector_l2_ops)"
    )
    rebuild_index.undo(phase)
    assert names(articles) == was, "also what was built and not attached"
    rebuild_index.apply(phase)
    rebuild_index.swap(phase)
    assert indexes(articles) == NEW
    with partitioned.killed_after(building, builds=2):
        rebuild_index.undo(phase)
    assert indexes(articles)["articles_embedding_hnsw"] == NEW["articles_embedding_hnsw"], "it serves on"
    half = names(articles)
    rebuild_index.undo(phase)
    assert indexes(articles) == BEFORE and rebuild_index.verify_undone(phase).passed
    assert set(half.values()) & set(names(articles).values()), "what was built stays"


def test_a_reader_of_a_partition_puts_off_the_drop_alone(
    parted: Callable[..., Phase], articles: psycopg.Connection[Any], database: str
) -> None:
    phase = parted()
    rebuild_index.apply(phase)
    with psycopg.connect(database, application_name="a long report") as reader:
        reader.execute("SELECT count(*) FROM articles_bolt_1")
        with pytest.raises(LockNotObtained, match="a long report"):
            rebuild_index.swap(phase)
    assert indexes(articles) == NEW | {"articles_embedding_hnsw_old": BEFORE["articles_embedding_hnsw"]}
    assert kinds(rebuild_index.plan(phase)) == ["rebuild.drop"]
    rebuild_index.swap(phase)
    assert indexes(articles) == NEW and rebuild_index.verify(phase).passed


def test_the_swap_of_a_partitioned_index_locks_no_table(
    parted: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = parted()
    rebuild_index.apply(phase)
    swap, drop = rebuild_index.swapping_plan(phase.connection, phase.ledger, phase.params).statements
    assert (swap.name, drop.name) == ("rebuild.swap", "index_partitions.drop_bracket")
    assert drop.lock == "ACCESS EXCLUSIVE on public.articles and every partition of it, for milliseconds"
    with articles.transaction(force_rollback=True):
        articles.execute(swap.query)
        held = articles.execute(
            "SELECT DISTINCT c.relkind, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation"
            " WHERE l.pid = pg_backend_pid() AND c.relname LIKE 'articles%' AND l.mode <> 'AccessShareLock'"
        ).fetchall()
    assert {mode for _, mode in held} == {"ShareUpdateExclusiveLock"}
    assert {kind for kind, _ in held} == {"i", "I"}


def test_a_partition_that_appears_beside_has_both_indexes(
    parted: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = parted()
    rebuild_index.apply(phase)
    articles.execute("CREATE TABLE articles_later PARTITION OF articles FOR VALUES IN ('later')")
    articles.execute("CREATE TABLE articles_gone PARTITION OF articles FOR VALUES IN ('gone')")
    assert rebuild_index.verify_new(phase).passed
    articles.execute("DROP TABLE articles_gone")
    rebuild_index.swap(phase)
    assert rebuild_index.verify(phase).passed
    assert indexes(articles) == NEW
    assert "articles_later_embedding_hnsw" in names(articles)


def test_ivfflat_lists_of_each_partition_come_back(
    parted: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lists() -> dict[str, list[str]]:
        return dict(
            articles.execute("SELECT relname, reloptions FROM pg_class WHERE relname LIKE '%ivfflat'").fetchall()
        )

    monkeypatch.setattr("runbook_lib.indexes.forecast.ROWS_A_LIST", 10)
    phase = parted(options={"method": "ivfflat", "lists": 3}, first={"method": "ivfflat"})
    before = lists()
    assert before["articles_acme_embedding_ivfflat"] != before["articles_bolt_0_embedding_ivfflat"]
    rebuild_index.apply(phase)
    rebuild_index.swap(phase)
    assert rebuild_index.verify(phase).failed == ()
    assert set(map(tuple, lists().values())) == {("lists=3",)} and lists().keys() == before.keys()
    rebuild_index.undo(phase)
    assert lists() == before and rebuild_index.verify_undone(phase).passed


def test_what_an_earlier_release_wrote_of_partitions_is_understood(
    parted: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = parted()
    rebuild_index.apply(phase)
    rebuild_index.swap(phase)
    of_each = {f"public.{leaf}": {"m": 16, "ef_construction": 64} for leaf in LEAVES}
    phase.note("rebuild", {"run_id": "earlier", "open": False, "oids": {}, "before": of_each, "recall": None})
    rebuild_index.undo(phase)
    assert indexes(articles) == BEFORE
