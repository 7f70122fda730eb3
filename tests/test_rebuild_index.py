"""The index built again: beside the one that serves, proved, swapped; interrupted anywhere, and taken back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.benchmark import index_recall
from runbook_lib.core.gates import GateFailed
from runbook_lib.core.phase import MIGRATE, Phase
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.operate import rebuild_index
from runbook_lib.search import search_function
from tests.conftest import write_params
from tests.stepping import step, step_all
from tests.test_server_versions import SECTIONS

Open = Callable[..., Phase]
DENSER = {"m": 24, "ef_construction": 96}


@pytest.fixture
def built(open_phase: Open) -> Callable[..., Phase]:
    """Opens the operation on a table whose index has the options of the first parameters."""

    def make(options: dict[str, Any] | None = None, **sections: Any) -> Phase:
        first = open_phase("60_build_index", **sections)
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(first)
        return open_phase("operate/rebuild_index", index=DENSER if options is None else options, **sections)

    return make


def indexes(connection: psycopg.Connection[Any]) -> dict[str, tuple[bool, list[str] | None]]:
    """Name, validity and options of the vector indexes."""
    found = connection.execute(
        "SELECT c.relname, i.indisvalid, c.reloptions FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_am a ON a.oid = c.relam WHERE a.amname IN ('hnsw', 'ivfflat') ORDER BY 1"
    ).fetchall()
    return {name: (valid, options) for name, valid, options in found}


NEW = {"articles_embedding_hnsw": (True, ["m=24", "ef_construction=96"])}
BEFORE = {"articles_embedding_hnsw": (True, ["m=16", "ef_construction=64"])}


def test_other_options_are_proved_before_the_old_index_goes(
    built: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = built()
    assert rebuild_index.check(phase).passed
    assert [s.name for s in rebuild_index.plan(phase)] == ["index.create_hnsw", "rebuild.swap", "rebuild.drop"]
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
    built: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = built()
    rebuild_index.apply(phase)
    asked = index_recall.questions(phase)
    names = ["articles_embedding_hnsw", "articles_embedding_hnsw_new"]
    for name, other in (names, names[::-1]):
        measured = index_recall.through(phase, asked, name, [other])
        assert measured and (measured.index, measured.queries) == (name, 20)
    assert list(indexes(articles)) == names
    assert index_recall.through(phase, asked, "no such index", []) is None


def test_an_index_that_finds_less_is_not_put_into_place(
    built: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = built()
    rebuild_index.apply(phase)
    real = index_recall.through

    def poor(
        phase: Phase, asked: index_recall.Questions, index: str, others: list[str]
    ) -> index_recall.Measured | None:
        found = real(phase, asked, index, others)
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
    built: Callable[..., Phase], articles: psycopg.Connection[Any], left: str, plan: list[str]
) -> None:
    phase = built()
    name = f"articles_embedding_hnsw_{left.split()[-1] if 'other' not in left else 'new'}"
    if left == "old":
        articles.execute(f"ALTER INDEX articles_embedding_hnsw RENAME TO {name}")
        name = "articles_embedding_hnsw"
    options = "m = 4, ef_construction = 8" if "other" in left else "m = 24, ef_construction = 96"
    articles.execute(f"CREATE INDEX {name} ON articles USING hnsw (embedding vector_cosine_ops) WITH ({options})")
    if left.startswith(("invalid", "cc")):
        articles.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", [name])
    assert [s.name for s in rebuild_index.plan(phase)] == plan
    rebuild_index.apply(phase)
    assert rebuild_index.verify_new(phase).passed
    rebuild_index.swap(phase)
    assert indexes(articles) == NEW
    assert rebuild_index.verify(phase).failed == ()


def test_killed_in_the_build_the_old_index_serves_and_the_rerun_clears(
    built: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = built()
    real = build_index.SQL["settings"]
    # A statement timeout stands for whatever ends a build half-way.
    text = real.text.replace(
        "set_config('statement_timeout', '0', false)", "set_config('statement_timeout', '1', false)"
    )
    articles.execute("INSERT INTO articles (title, body) SELECT title, body FROM articles, generate_series(1, 20)")
    articles.execute(
        "UPDATE articles SET embedding = (SELECT embedding FROM articles WHERE id = 1) WHERE embedding IS NULL"
    )
    with monkeypatch.context() as patch:
        patch.setitem(build_index.SQL, "settings", replace(real, text=text))
        with pytest.raises(psycopg.errors.QueryCanceled):
            rebuild_index.apply(phase)
    assert indexes(articles)["articles_embedding_hnsw"] == BEFORE["articles_embedding_hnsw"]
    assert indexes(articles).get("articles_embedding_hnsw_new", (False,))[0] is False
    rebuild_index.apply(phase)
    rebuild_index.swap(phase)
    assert indexes(articles) == NEW


def test_a_running_build_is_no_leftover(built: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch) -> None:
    phase = built()
    found = [replace(s, builds_under_way=1) for s in rebuild_index.standing(phase)]
    monkeypatch.setattr(rebuild_index, "standing", lambda _: found)
    assert str(rebuild_index.check(phase).failed[0]) == (
        "FAIL    rebuild.no_build_is_under_way   articles_embedding_hnsw on public.articles\n"
        "  found   1 builds at work on this table\n"
        "  needed  none\n"
        "  danger  the two would wait for each other, and what looks left over may be at work\n"
        "  do      wait for it: SELECT * FROM pg_stat_progress_create_index;"
    )


def test_a_whole_index_of_such_a_name_is_somebodys(
    built: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = built()
    articles.execute("CREATE INDEX mine_ccnew ON articles USING hnsw (embedding vector_cosine_ops)")
    assert {s.name: s.role for s in rebuild_index.standing(phase)}["mine_ccnew"] == "other"
    assert "rebuild.drop" not in [s.name for s in rebuild_index.building_plan(phase)]


@pytest.mark.parametrize("so_far", ["built", "swapped", "done"])
def test_undo_from_anywhere_leads_back_to_the_index_that_served(
    built: Callable[..., Phase], articles: psycopg.Connection[Any], so_far: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = built()
    rebuild_index.apply(phase)
    if so_far == "swapped":
        # The old index is still there: the drop has not come to its turn.
        phase.do(rebuild_index.swapping_plan(phase).statements[0])
        phase.note("rebuild", {"run_id": phase.run_id, "before": {"m": 16, "ef_construction": 64}})
    elif so_far == "done":
        rebuild_index.swap(phase)
    rebuild_index.undo(phase)
    assert indexes(articles) == BEFORE
    if so_far != "built":
        assert rebuild_index.verify_undone(phase).passed
    assert rebuild_index.undo_plan(phase).statements == (), "twice does nothing"


def test_an_aged_index_of_the_same_options_is_built_anew(
    built: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = built(options={})
    was = rebuild_index.standing(phase)[0].oid
    rebuild_index.apply(phase)
    rebuild_index.swap(phase)
    assert indexes(articles) == BEFORE
    assert rebuild_index.standing(phase)[0].oid != was


def test_ivfflat_lists(built: Callable[..., Phase], articles: psycopg.Connection[Any], open_phase: Open) -> None:
    first = open_phase("60_build_index", index={"method": "ivfflat", "lists": 4})
    for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(first)
    phase = open_phase("operate/rebuild_index", index={"method": "ivfflat", "lists": 8})
    rebuild_index.apply(phase)
    assert rebuild_index.verify_new(phase).gates[0].verdict == "PASS"
    rebuild_index.swap(phase)
    assert indexes(articles) == {"articles_embedding_ivfflat": (True, ["lists=8"])}


def test_without_execute_nothing_is_built(built: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = replace(built(), execute=False)
    assert len(rebuild_index.apply(phase).rows) == 1
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
