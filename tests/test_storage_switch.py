"""What the index holds, through the whole migration, and gone over from one storage to another and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from runbook_lib.benchmark import explain, plan_diagnosis
from runbook_lib.core.names import operator_class
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.indexes import building
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.operate import rebuild_index, storage_switch
from runbook_lib.search import search_function
from tests import partitioned, shapes
from tests.conftest import write_params
from tests.stepping import step, step_all
from tests.test_rebuild_index import kinds

Open = Callable[..., Phase]
SECTIONS: dict[str, dict[str, Any]] = {
    "vector": {"dimension": shapes.DIMENSION},
    "embeddings": {"callable": "tests.shapes:embed"},
    # A search of today that is slow on every machine: 80_shadow compares latencies.
    "legacy": {
        "query": "WITH slow AS MATERIALIZED (SELECT pg_sleep(0.02)) SELECT id FROM articles, slow"
        " WHERE title ILIKE '%' || :query || '%' OR body ILIKE '%' || :query || '%' ORDER BY id LIMIT :k"
    },
    "queries": {"sample": 10, "judged_sample": 10},
    "cut_over": {"share_steps_percent": [100], "calls_per_step": 10, "largest_relevance_loss": 1.0},
    "tune": {"ef_search": [40, 120], "target_recall": 0.9, "queries": 40},
}
BIT = {"storage": "bit", "rerank": 8}


def recall_of_the_function(connection: psycopg.Connection[Any], folder: Path) -> float:
    """Of its answers to the queries, k = 10, against distances that numpy works out."""
    found = connection.execute("SELECT id, embedding::text FROM articles WHERE embedding IS NOT NULL").fetchall()
    keys = np.array([key for key, _ in found])
    vectors = np.array([json.loads(text) for _, text in found])
    texts = [json.loads(line)["text"] for line in (folder / "queries.jsonl").read_text().splitlines()]
    shares = []
    for text, asked in zip(texts, shapes.embed(texts), strict=True):
        exact = set(keys[np.argsort(1 - vectors @ asked, kind="stable")[:10]].tolist())
        rows = connection.execute(
            "SELECT id, score, answered_by FROM search_articles(%s, %s::real[], 10)", [text, asked.tolist()]
        ).fetchall()
        scores = [score for _, score, _ in rows]
        assert {route for *_, route in rows} == {"vector"} and scores == sorted(scores, reverse=True)
        place = keys.tolist().index(rows[0][0])
        assert scores[0] == pytest.approx(vectors[place] @ asked - 1, abs=1e-4), "the full vectors' distance"
        shares.append(len(exact & {key for key, *_ in rows}) / 10)
    return float(np.mean(shares))


def held(connection: psycopg.Connection[Any]) -> dict[str, tuple[bool, str, str]]:
    """Validity, operator class and expression of every vector index of the table itself, by name."""
    found = connection.execute(
        "SELECT c.relname, i.indisvalid, o.opcname, pg_get_indexdef(c.oid, 1, true) FROM pg_index i"
        " JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam"
        " JOIN pg_opclass o ON o.oid = i.indclass[0] WHERE a.amname IN ('hnsw', 'ivfflat')"
        " AND i.indrelid = 'articles'::regclass ORDER BY 1"
    ).fetchall()
    return {name: (valid, opclass, on) for name, valid, opclass, on in found}


def function(connection: psycopg.Connection[Any]) -> str:
    row = connection.execute(
        "SELECT string_agg(pg_get_functiondef(oid), '' ORDER BY proname, proargtypes::text) FROM pg_proc"
        " WHERE proname ~ '^(search_articles|articles_by_.*)$'"
    ).fetchone()
    return str(row[0] or "") if row else ""


def own_columns(connection: psycopg.Connection[Any]) -> list[str]:
    found = connection.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'articles'::regclass AND NOT attisdropped ORDER BY attnum"
    ).fetchall()
    return [name for (name,) in found]


OF_BIT = {"articles_embedding_hnsw": (True, "bit_hamming_ops", "(binary_quantize(embedding)::bit(64))")}
OF_HALFVEC = {"articles_embedding_hnsw": (True, "halfvec_cosine_ops", "(embedding::halfvec(64))")}


def test_bits_through_the_whole_migration_then_over_to_halfvec_and_all_the_way_back(
    articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    articles.execute("ALTER TABLE articles SET (autovacuum_enabled = off)")
    columns = own_columns(articles)
    path = write_params(tmp_path, **SECTIONS, index=BIT)
    step_all("migrate", MIGRATE, path)
    assert held(articles) == OF_BIT
    assert recall_of_the_function(articles, tmp_path) >= 0.9
    step("operate/monitor", path)

    path = write_params(tmp_path, **SECTIONS, index={"storage": "halfvec"})
    step("operate/rebuild_index", path)
    assert held(articles) == OF_HALFVEC
    assert "halfvec" in function(articles) and "binary_quantize" not in function(articles)
    assert "hnsw.ef_search" in function(articles), "the function is switched with a setting that was proved"
    assert recall_of_the_function(articles, tmp_path) >= 0.99
    step("migrate/70_tune", path)
    step("operate/monitor", path)

    step_all("undo", UNDO, path)
    assert held(articles) == {} and function(articles) == ""
    assert own_columns(articles) == columns


@pytest.fixture
def built(open_phase: Open, articles: psycopg.Connection[Any]) -> Callable[..., Phase]:
    """Opens a phase on the table with vectors and an index by these parameters."""

    def make(name: str = "60_build_index", **sections: Any) -> Phase:
        for leaf in partitioned.leaves(articles) or ["articles"]:
            articles.execute(f"ALTER TABLE {leaf} SET (autovacuum_enabled = off)")
        phase = open_phase(name, **SECTIONS | sections)
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        return phase

    return make


@pytest.fixture(params=["ordinary", "partitioned"])
def of_either_kind(
    request: pytest.FixtureRequest, built: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> Callable[..., Phase]:
    """The same on an ordinary table, and on one that is partitioned by tenants, one of them again."""
    if request.param == "partitioned":
        articles.execute("DROP TABLE articles")
        partitioned.create_articles(articles, "list")
    return built


@pytest.mark.parametrize(
    ("distance", "storage", "wanted"),
    [
        ("cosine", "halfvec", "halfvec_cosine_ops"),
        ("l2", "halfvec", "halfvec_l2_ops"),
        ("inner_product", "halfvec", "halfvec_ip_ops"),
        ("l2", "bit", "bit_hamming_ops"),
        ("inner_product", "bit", "bit_hamming_ops"),
    ],
)
def test_every_distance_has_its_operator_class_and_every_plan_reads_the_index(
    built: Callable[..., Phase], distance: str, storage: str, wanted: str
) -> None:
    phase = built(
        vector={"dimension": shapes.DIMENSION, "distance": distance}, index={"storage": storage, "rerank": 8}
    )
    assert operator_class(phase.params) == wanted
    assert [str(g) for g in build_index.verify(phase) if g.verdict != "PASS"] == []
    phase.connection.execute("SELECT '[1]'::vector")
    for statement in search_function.set_search_setting(phase.connection, phase.params, 100):
        phase.do(statement)
    assert [str(g) for g in explain.gates(phase.connection, phase.ledger, phase.params) if g.verdict != "PASS"] == []


@pytest.mark.parametrize("storage", ["halfvec", "bit"])
def test_ivfflat_and_a_side_table_take_every_storage(built: Callable[..., Phase], storage: str) -> None:
    phase = built(
        vector={"dimension": shapes.DIMENSION, "layout": "side_table"},
        index={"method": "ivfflat", "lists": 4, "storage": storage, "rerank": 8},
    )
    assert [str(g) for g in build_index.verify(phase) if g.verdict != "PASS"] == []
    for statement in search_function.set_search_setting(phase.connection, phase.params, 4):
        phase.do(statement)
    assert [str(g) for g in explain.gates(phase.connection, phase.ledger, phase.params) if g.verdict != "PASS"] == []


def test_a_column_of_more_than_2000_dimensions_is_indexed_as_halfvec(
    articles: psycopg.Connection[Any], open_phase: Open
) -> None:
    phase = open_phase("60_build_index", vector={"dimension": 3000}, index={"storage": "halfvec"})
    for module in (extension, expand_schema):
        module.apply(phase)
    articles.execute(
        "UPDATE articles SET embedding = (SELECT array_agg(sin(id * d)) FROM generate_series(1, 3000) d)::real[]"
    )
    build_index.apply(phase)
    assert [str(g) for g in build_index.verify(phase) if g.verdict != "PASS"] == []


def test_an_index_of_another_storage_does_not_pass_for_this_one(
    built: Callable[..., Phase], open_phase: Open
) -> None:
    built()
    gates = build_index.verify(open_phase("60_build_index", **SECTIONS, index={"storage": "halfvec"}))
    assert str(gates.failed[0]) == (
        "FAIL    index.has_the_right_operator_class   articles_embedding_hnsw on public.articles\n"
        "  found   hnsw with vector_cosine_ops on embedding\n"
        "  needed  hnsw with halfvec_cosine_ops on (embedding::halfvec(64))\n"
        "  danger  queries with the distance that was asked for cannot use it\n"
        "  do      put index.storage back, or switch to another one with operate/rebuild_index"
    )


def test_a_query_that_does_not_spell_what_the_index_holds_is_told_how(built: Callable[..., Phase]) -> None:
    phase = built(
        search={
            "application_query": "SELECT id FROM articles ORDER BY embedding <=> :embedding::vector(64) LIMIT :k"
        },
        index={"storage": "halfvec"},
    )
    sent = explain.application_query(phase.connection, phase.params)
    cause = plan_diagnosis.diagnose(phase.connection, phase.params, sent, "custom")
    assert cause.name == "not_as_indexed"
    assert cause.found == "sorted by embedding <=> $1::vector(64); the index holds (embedding::halfvec(64))"
    assert cause.do == (
        "send instead: SELECT id FROM articles ORDER BY"
        " (embedding::halfvec(64)) <=> :embedding::vector(64)::halfvec(64) LIMIT :k"
    )


def test_the_function_goes_over_with_the_index_and_comes_back_with_it(
    of_either_kind: Callable[..., Phase], open_phase: Open, articles: psycopg.Connection[Any]
) -> None:
    first = of_either_kind()
    for statement in search_function.set_search_setting(first.connection, first.params, 40):
        first.do(statement)
    was, indexes = function(articles), held(articles)
    phase = open_phase("operate/rebuild_index", **SECTIONS, index=BIT)
    assert kinds(rebuild_index.plan(phase)) == ["index.create_hnsw", "rebuild.swap", "rebuild.drop"]
    assert str(rebuild_index.verify(phase).failed[-1]) == (
        "FAIL    rebuild.function_searches_the_index   search_articles\n"
        "  found   another query than these parameters make\n"
        "  needed  the query of index.storage: bit, index.rerank: 8\n"
        "  danger  every search would read the whole table\n"
        "  do      run 70_tune with execute: true; it creates the function again"
    )
    rebuild_index.apply(phase)
    assert function(articles) == was, "nothing that serves is touched before the proof"
    assert rebuild_index.verify_new(phase).passed
    rebuild_index.swap(phase)
    assert held(articles) == OF_BIT and "LIMIT $3 * 8" in function(articles)
    assert rebuild_index.verify(phase).passed
    assert rebuild_index.plan(phase).statements == ()
    rebuild_index.undo(phase)
    assert (function(articles), held(articles)) == (was, indexes)
    assert rebuild_index.verify_undone(phase).passed
    assert rebuild_index.undo_plan(phase).statements == ()
    assert all(valid for valid, _ in partitioned.index_state(articles).values())


def test_interrupted_between_swap_and_drop_the_way_back_brings_index_and_function(
    built: Callable[..., Phase], open_phase: Open, articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built()
    was, indexes = function(articles), held(articles)
    phase = open_phase("operate/rebuild_index", **SECTIONS, index={"storage": "halfvec"})
    rebuild_index.apply(phase)
    assert rebuild_index.verify_new(phase).passed
    with monkeypatch.context() as patch:
        patch.setattr(building, "concurrently", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rebuild_index.swap(phase)
    assert set(held(articles)) == {"articles_embedding_hnsw", "articles_embedding_hnsw_old"}
    assert [s.name for s in rebuild_index.plan(phase)] == ["rebuild.drop"]
    rebuild_index.undo(phase)
    assert (function(articles), held(articles)) == (was, indexes)
    assert rebuild_index.verify_undone(phase).passed


def test_another_rerank_alone_makes_the_function_anew(built: Callable[..., Phase], open_phase: Open) -> None:
    built(index=BIT)
    phase = open_phase("operate/rebuild_index", **SECTIONS, index=BIT | {"rerank": 12})
    assert storage_switch.changes_function(phase.connection, phase.params, "bit")
    statements = search_function.set_search_setting(phase.connection, phase.params, 40)
    assert [s.name for s in statements][:2] == ["search.create_function", "search.set_search_settings"]
    for statement in statements:
        phase.do(statement)
    assert search_function.is_as_planned(phase.connection, phase.params) and not storage_switch.changes_function(
        phase.connection, phase.params, "bit"
    )
