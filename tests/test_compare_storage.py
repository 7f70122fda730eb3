"""The comparison of what an index could hold: figures against independent ones, and nothing left behind."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from runbook_lib.benchmark import charts
from runbook_lib.benchmark import storage_variants as measuring
from runbook_lib.benchmark.storage_variants import StorageComparison
from runbook_lib.core.gates import GateFailed
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.operate import compare_storage
from runbook_lib.params import Params
from runbook_lib.search import search_function
from tests import shapes, toy
from tests.conftest import write_params
from tests.stepping import step, step_all

Open = Callable[..., Phase]
SECTIONS: dict[str, dict[str, Any]] = {
    "vector": {"dimension": shapes.DIMENSION},
    "embeddings": {"callable": "tests.shapes:embed"},
    "tune": {"ef_search": [10, 40, 120], "target_recall": 0.9},
    "storage": {"rerank": [1, 8], "sample_rows": 150},
}


@pytest.fixture
def loaded(open_phase: Open) -> Callable[..., Phase]:
    """Opens the operation on a table with vectors, and no index."""

    def make(**sections: Any) -> Phase:
        phase = open_phase("operate/compare_storage", **SECTIONS | sections)
        for module in (search_function, extension, expand_schema, load_embeddings, backfill):
            module.apply(phase)
        phase.connection.execute("ANALYZE articles")
        return phase

    return make


def relations(connection: psycopg.Connection[Any]) -> set[str]:
    """Tables of the ledger's schema, and indexes of the target."""
    found = connection.execute(
        "SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'runbook'::regnamespace AND relkind = 'r'"
        " UNION ALL SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'articles'::regclass"
    ).fetchall()
    return {name for (name,) in found}


def test_every_shape_is_measured_and_nothing_is_left(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = loaded(storage={"rerank": [1, 8], "sample_rows": 1000})
    before = relations(articles)
    assert compare_storage.check(phase).passed
    found = compare_storage.apply(phase)
    assert isinstance(found, StorageComparison)
    assert [str(g) for g in compare_storage.verify(phase) if g.verdict != "PASS"] == []
    assert relations(articles) == before
    assert [r["title"] for r in found.found] == [
        "vector, as it is",
        "halfvec",
        "halfvec, ivfflat",
        "bit, 1 × k again",
        "bit, 8 × k again",
        "first 32 dimensions, 1 × k again",
        "first 32 dimensions, 8 × k again",
        "first 16 dimensions, 1 × k again",
        "first 16 dimensions, 8 × k again",
    ]
    by_title = {r["title"]: r for r in found.found}
    assert found.facts["rows"] == 200 and found.facts["whole_rows"] >= 200
    assert by_title["vector, as it is"]["todays"] and by_title["vector, as it is"]["recall"] >= 0.99
    assert by_title["halfvec"]["bytes"] < by_title["vector, as it is"]["bytes"]
    assert by_title["bit, 8 × k again"]["bytes"] < by_title["halfvec"]["bytes"]
    assert by_title["bit, 8 × k again"]["recall"] > by_title["bit, 1 × k again"]["recall"], "more are sorted again"
    assert by_title["bit, 8 × k again"]["whole_bytes"] >= by_title["bit, 8 × k again"]["bytes"]
    assert found.facts["exact_ndcg"] is not None and 0 < found.facts["exact_ndcg"] <= 1
    assert phase.ledger.latest("storage") == found.as_data()
    assert "per_query" not in found.as_data()["found"][0]
    frame = found.to_frame()
    assert frame["title"].tolist() == [r["title"] for r in found.found] and frame["bytes"].dtype == "int64"
    assert found.table().to_frame()["p95 (ms)"].dtype == "float64"
    assert "nothing: exact search" in str(found.table()) and html.escape(found.recommendation) in found._repr_html_()


def test_recall_is_that_of_the_full_vectors_by_an_independent_count(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    """Without sorting again, bits answer in the order of their codes: the same by numpy, over the same sample."""
    phase = loaded(storage={"rerank": [1], "sample_rows": 1000, "ivfflat": False}, tune={"ef_search": [400]})
    found = compare_storage.apply(phase)
    assert isinstance(found, StorageComparison)
    bits = next(r for r in found.found if r["held"] == "bit")
    rows = articles.execute("SELECT id, embedding::real[] FROM articles WHERE embedding IS NOT NULL").fetchall()
    vectors = np.array([v for _, v in rows])
    codes = vectors > 0
    texts = [f"{s} {v}" for s in toy.SUBJECTS for v in toy.VERBS]
    least, most = [], []
    for asked in shapes.embed(texts):
        wanted = set(np.argsort(1 - vectors @ asked, kind="stable")[:10].tolist())
        far = (codes != (asked > 0)).sum(axis=1)
        border = np.sort(far)[9]
        sure, maybe = np.flatnonzero(far < border), np.flatnonzero(far == border)
        certain = len(wanted & set(sure.tolist()))
        ties = len(wanted & set(maybe.tolist()))
        room = 10 - len(sure)
        most.append(certain + min(ties, room))
        least.append(certain + max(0, room - (len(maybe) - ties)))
    assert np.mean(least) / 10 - 0.06 <= bits["recall"] <= np.mean(most) / 10 + 0.06, "of 20 of these 40 queries"
    first = next(r for r in found.found if r["held"] == "first")
    assert first["recall"] < 0.9, "the model was not trained for its first dimensions"


def test_the_plan_is_made_before_the_table_that_is_compared(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = loaded(storage={"sample_rows": 60_000, "rerank": [4], "ivfflat": True})
    articles.execute("UPDATE pg_class SET reltuples = 1e8 WHERE oid = 'articles'::regclass")
    said = [s.text(phase.connection) for s in compare_storage.plan(phase)]
    assert "CREATE UNLOGGED TABLE" in said[0] and said[-1].startswith("DROP TABLE")
    assert any("lists = 60" in s for s in said), "by the rows that are compared, not by those of the table"


def test_a_sample_holds_the_judged_rows_and_no_more_than_was_asked_for(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = loaded(storage={"sample_rows": 100, "rerank": [4]})
    seen: dict[str, Any] = {}

    def look(phase: Phase) -> Any:
        rows = articles.execute("SELECT id FROM runbook.articles_storage").fetchall()
        seen["rows"] = len(rows)
        seen["unlogged"] = articles.execute(
            "SELECT relpersistence FROM pg_class WHERE oid = 'runbook.articles_storage'::regclass"
        ).fetchone()
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_storage, "_judged_keys", lambda *_: ["1", "2", "3"])
    monkeypatch.setattr(compare_storage, "_compare", look)
    before = relations(articles)
    with pytest.raises(KeyboardInterrupt):
        compare_storage.apply(phase)
    assert 100 <= seen["rows"] <= 103 and seen["unlogged"] == ("u",)
    assert relations(articles) == before, "interrupted, it leaves nothing"


def test_after_a_kill_the_next_run_clears_what_was_left(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = loaded(storage={"sample_rows": 100, "rerank": [4], "where": "column", "ivfflat": False})
    build_index.apply(phase)
    before = relations(articles)
    articles.execute("CREATE TABLE runbook.articles_storage (x int)")
    articles.execute(
        "CREATE INDEX runbook_articles_compared_bit_64_hnsw ON articles USING hnsw"
        " ((binary_quantize(embedding)::bit(64)) bit_hamming_ops)"
    )
    assert str(compare_storage.verify(phase).failed[-1]) == (
        "FAIL    storage.nothing_is_left   articles\n"
        "  found   articles_storage, runbook_articles_compared_bit_64_hnsw\n"
        "  needed  nothing\n"
        "  danger  disk is taken, and where an index is left, every write pays for it\n"
        "  do      run compare_storage.undo(phase), or operate/compare_storage again"
    )
    found = compare_storage.apply(phase)
    assert isinstance(found, StorageComparison)
    assert relations(articles) == before
    today = found.found[0]
    assert today["todays"] and today["build_s"] is None and today["uses_its_index"], "the index that serves, as it is"
    assert compare_storage.verify(phase).passed
    assert compare_storage.undo_plan(phase.connection, phase.params).statements == ()


def row(title: str, held: str, size: int, recall: float, p95: float, **other: Any) -> dict[str, Any]:
    return {
        "title": title, "held": held, "dimension": 64, "method": "hnsw", "todays": held == "vector", "bytes": size,
        "build_s": 1.0, "bytes_a_row": size / 100, "whole_bytes": size * 10, "rerank": 1, "setting": 40,
        "recall": recall, "short": 0, "p50_ms": p95 / 2, "p95_ms": p95, "uses_its_index": True, "ndcg": None,
        "per_query": {}, **other,
    }  # fmt: skip


FACTS = {
    "rows": 100, "whole_rows": 1000, "queries": 20, "judged": 0, "agrees": {}, "exact_p50_ms": 9.0,
    "exact_ndcg": None,
}  # fmt: skip
TODAY = row("vector, as it is", "vector", 1000, 0.97, 8.0)
HALF = row("halfvec", "halfvec", 600, 0.96, 8.0)
BIT = row("bit, 4 × k again", "bit", 200, 0.96, 9.0, rerank=4)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([TODAY, HALF, BIT], "Set index.storage: bit, index.rerank: 4: "),
        ([TODAY, HALF, BIT | {"recall": 0.94}], "Set index.storage: halfvec: "),
        ([TODAY, HALF, BIT | {"p95_ms": 13.0}], "Set index.storage: halfvec: "),
        ([TODAY, HALF, BIT | {"short": 1}], "Set index.storage: halfvec: "),
        ([TODAY, HALF | {"bytes": 900}], "Keep what the index holds today: "),
        ([TODAY, BIT | {"held": "first"}], "Keep what the index holds today: "),
        ([TODAY, BIT | {"method": "ivfflat"}], "Keep what the index holds today: "),
        ([TODAY | {"recall": 0.5}, HALF], "Set index.storage: halfvec: "),
        ([TODAY | {"recall": 0.5}, HALF | {"recall": 0.6}], "Nothing reaches recall 0.950; halfvec comes nearest"),
        (
            [
                TODAY | {"per_query": {f"q{i}": 0.9 for i in range(20)}},
                HALF | {"per_query": {f"q{i}": 0.7 for i in range(20)}},
            ],
            "Keep what the index holds today: ",
        ),
    ],
)
def test_the_advice_is_the_smallest_that_finds_as_much_as_fast_and_as_relevant(
    make_params: Callable[..., Params], rows: list[dict[str, Any]], said: str
) -> None:
    found = StorageComparison.of(make_params(), rows, FACTS)
    assert found.recommendation.startswith(said)


def test_the_advice_says_its_figures(make_params: Callable[..., Params]) -> None:
    assert StorageComparison.of(make_params(), [TODAY, HALF], FACTS).recommendation == (
        "Set index.storage: halfvec: 5.9 kB for the whole table, recall 0.960, p50 4.00 ms, p95 8.00 ms, 60% of"
        " today's index; today's has 9.8 kB for the whole table, recall 0.970, p50 4.00 ms, p95 8.00 ms."
    )


def test_what_no_index_can_hold_is_not_compared(make_params: Callable[..., Params]) -> None:
    def titles(**vector: Any) -> list[str]:
        p = make_params(vector=vector, index={"storage": "bit"}, storage={"ivfflat": False})
        return [s.title(p) for s in measuring.possible(p)]

    firsts = ["first 1536 dimensions", "first 768 dimensions"]
    assert titles(dimension=3072) == ["bit", "halfvec", *firsts]
    assert titles(dimension=3072, type="halfvec") == ["bit", "halfvec, as it is", *firsts]
    assert titles(dimension=6000) == ["bit", "first 1500 dimensions"]


def test_the_picture_names_every_way_and_the_target(make_params: Callable[..., Params]) -> None:
    picture = charts.bytes_against_recall(StorageComparison.of(make_params(), [TODAY, HALF, BIT], FACTS).as_data())
    for text in (
        "1  vector, as it is, 4.0 ms, today's",
        "2  halfvec, 4.0 ms",
        "3  bit, 4 × k again, 4.5 ms ✔",
        "target 0.95",
    ):
        assert text in picture


def test_the_notebook_compares_and_plans_without_changing_anything(
    articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    path = write_params(tmp_path, **SECTIONS | {"storage": {"rerank": [8], "sample_rows": 200, "ivfflat": False}})
    with pytest.raises(GateFailed) as raised:
        step("operate/compare_storage", path)
    assert [g.name for g in raised.value.gates.failed] == ["phase.predecessor_passed"]
    step_all("migrate", MIGRATE[:6], path)
    before = relations(articles)
    step("operate/compare_storage", path, execute=False)
    assert relations(articles) == before
    left = step("operate/compare_storage", path, times=2)
    assert relations(articles) == before
    assert isinstance(left["compared"], StorageComparison)
