"""Vectors of chunks: every text is whole in its chunks, rows are answered and not chunks, and all of it goes back."""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from runbook_lib.benchmark import comparison, exact, query_set
from runbook_lib.benchmark.recall_at_k import share
from runbook_lib.core import db, registry
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.embeddings import masking, splitting
from runbook_lib.migrate import (
    backfill,
    build_index,
    expand_schema,
    extension,
    load_embeddings,
    preflight,
    text_lengths,
)
from runbook_lib.operate import refresh
from runbook_lib.params import Params
from runbook_lib.search import search_function
from tests import shapes, toy
from tests.conftest import write_params
from tests.servers import dump
from tests.stepping import step_all
from tests.test_server_versions import SECTIONS

Connection = psycopg.Connection[Any]
Open = Callable[..., Phase]
CHUNKS: dict[str, Any] = {"embeddings": {"chunks": {"size": 40}}}
TEXT = "concat_ws(E'\\n', a.title, a.body)"
LENGTHEN = """
    UPDATE articles a SET body = a.body || '. ' || (
        SELECT string_agg(o.body, '. ' ORDER BY o.id) FROM articles o
        WHERE o.id IN (a.id % 200 + 1, (a.id + 77) % 200 + 1)
    ) WHERE a.id % 3 = 0 AND title IS NOT NULL
"""
# Rows whose texts and parts no other has, so that one order alone is right.
APART: dict[str, Any] = {
    "vector": {"dimension": shapes.DIMENSION},
    "embeddings": {"callable": "tests.shapes:embed", "chunks": {"size": 40, "overlap": 15}},
}


@pytest.fixture
def long_articles(articles: Connection) -> Connection:
    """The toy table, with long texts in every third row."""
    articles.execute(LENGTHEN)
    return articles


@pytest.fixture
def loaded(open_phase: Open, long_articles: Connection) -> Open:
    """Opens a phase on the table with its chunks filled."""

    def make(name: str = "60_build_index", **sections: Any) -> Phase:
        phase = open_phase(name, **(CHUNKS | sections))
        for module in (extension, expand_schema, load_embeddings, backfill):
            module.apply(phase)
        long_articles.execute("DELETE FROM runbook.articles_queue")
        return phase

    return make


def chunks_of(connection: Connection) -> dict[int, list[tuple[int, int, int, list[float], bytes]]]:
    found: dict[int, list[Any]] = {}
    for key, *rest in connection.execute(
        "SELECT id, embedding_chunk, embedding_start, embedding_length, embedding::real[], embedding_hash"
        " FROM articles_embedding ORDER BY id, embedding_chunk"
    ):
        found.setdefault(key, []).append(tuple(rest))
    return found


def assert_every_text_is_whole(connection: Connection, embed: Callable[[list[str]], np.ndarray] = toy.embed) -> int:
    """Made again outside the runbook: each chunk has the vector of its passage and the hash of the whole text, and
    together they hold every letter of it. Returns the chunks."""
    found = chunks_of(connection)
    texts = dict(
        connection.execute(f"SELECT id, {TEXT} FROM articles a WHERE btrim({TEXT}, E' \\n') <> ''").fetchall()
    )
    assert set(found) == set(texts)
    for key, text in texts.items():
        seen = [not c.strip() for c in text]
        for at, (number, start, length, vector, text_hash) in enumerate(found[key]):
            passage = text[start - 1 : start - 1 + length]
            assert number == at and passage and text_hash == hashlib.sha256(text.encode()).digest()[:16]
            assert np.allclose(vector, embed([passage])[0], atol=1e-6)
            seen[start - 1 : start - 1 + length] = [True] * length
        assert all(seen), f"a part of row {key} is in no chunk"
    return sum(map(len, found.values()))


def best_by_hand(connection: Connection, query: str, rows: str = "true") -> list[tuple[float, int]]:
    """Each row with the similarity of its nearest chunk, the best first."""
    (vector,) = shapes.embed([query])
    allowed = {key for (key,) in connection.execute(f"SELECT id FROM articles a WHERE {rows}")}
    found = chunks_of(connection).items()
    best = [(max(float(np.dot(c[3], vector)) for c in chunks), key) for key, chunks in found if key in allowed]
    return sorted(best, key=lambda row: (-row[0], row[1]))


def test_there_and_back(
    long_articles: Connection, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two hundred rows are searched within milliseconds by any way: what is faster is chance here.
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)
    before = dump(database)
    path = write_params(tmp_path, **SECTIONS, **CHUNKS)
    step_all("migrate", MIGRATE, path)
    assert assert_every_text_is_whole(long_articles) > 2 * toy.ROWS
    (recorded,) = long_articles.execute(
        "SELECT body->>'vector_reads_the_index' FROM runbook.entry WHERE kind = 'shadow'"
    ).fetchone() or (None,)
    assert recorded == "true"
    step_all("undo", UNDO, path)
    assert dump(database) == before


@pytest.mark.parametrize("chunks", [{"size": 40, "overlap": 15}, {"size": 25}, {"size": 5000}])
def test_chunks_hold_every_letter(loaded: Open, long_articles: Connection, chunks: dict[str, Any]) -> None:
    phase = loaded(embeddings={"chunks": chunks})
    assert load_embeddings.verify(phase).passed and backfill.verify(phase).passed
    n = assert_every_text_is_whole(long_articles)
    assert (n == toy.ROWS) == (chunks["size"] == 5000)
    assert expand_schema.plan(phase).statements == ()


@pytest.mark.parametrize("storage", ["vector", "halfvec"])
def test_a_search_answers_rows_by_their_nearest_chunk(loaded: Open, long_articles: Connection, storage: str) -> None:
    phase = loaded(**APART, index={"storage": storage}, target={"filters": ["status"]})
    long_articles.execute("UPDATE articles SET status = 'Rare' WHERE id % 9 = 0")
    search_function.apply(phase)
    build_index.apply(phase)
    for query in ("cookie expires", "socket blocks in a loop. the password", "thread", "at midnight"):
        vector = shapes.embed([query])[0].tolist()
        for route, rows in (("vector", None), ("vector", "Rare")):
            long_articles.execute("SELECT set_config('runbook.route', %s, false)", [route])
            long_articles.execute(
                "SET hnsw.iterative_scan = strict_order; SET hnsw.ef_search = 100; SET enable_sort = off"
            )
            got = long_articles.execute(
                "SELECT s.id, s.similarity, s.answered_by, s.rank, substr("
                + TEXT
                + ", s.chunk_start, s.chunk_length)"
                " FROM search_articles(%s, %s::real[], 25, filter_status => %s) s JOIN articles a USING (id)"
                " ORDER BY s.rank",
                [query, vector, rows],
            ).fetchall()
            expected = best_by_hand(long_articles, query, f"status = '{rows}'" if rows else "true")
            # Of rows at one distance, which comes first is chance.
            nearest = [s for s, _ in expected[:10]]
            assert [r[1] for r in got][:10] == pytest.approx(nearest, abs=1e-3)
            assert len({r[0] for r in got}) == len(got) == min(25, len(expected))
            for key, similarity, by, _, passage in got:
                assert by == route
                assert similarity == pytest.approx({k: s for s, k in expected}[key], abs=1e-3)
                assert float(shapes.embed([passage])[0] @ np.array(vector)) == pytest.approx(similarity, abs=1e-3)


def test_rows_are_returned_however_many_chunks_of_one_row_are_nearer(loaded: Open, long_articles: Connection) -> None:
    long_articles.execute(
        "INSERT INTO articles (title, body) SELECT 'cookie', string_agg('cookie leaks in part number ' || i, '. ')"
        " FROM generate_series(1, 900) i"
    )
    phase = loaded(**APART)
    search_function.apply(phase)
    build_index.apply(phase)
    long_articles.execute(
        "SET runbook.route = vector; SET enable_sort = off; SET enable_seqscan = off; SET jit = off"
    )
    long_articles.execute("SET hnsw.iterative_scan = strict_order; SET hnsw.ef_search = 10")
    vector = shapes.embed(["cookie leaks in part number"])[0].tolist()
    got = long_articles.execute(
        "SELECT id, similarity FROM search_articles('x', %s::real[], 20)", [vector]
    ).fetchall()
    assert len({key for key, _ in got}) == len(got) == 20
    expected = best_by_hand(long_articles, "cookie leaks in part number")
    assert [s for _, s in got] == pytest.approx([s for s, _ in expected[:20]], abs=1e-3)
    (longest,) = [key for key, chunks in chunks_of(long_articles).items() if len(chunks) > 500]
    assert longest in {key for key, _ in got}, "its chunks are most of those that are near"
    # Hybrid fetches rows too, and shows the passage of each.
    long_articles.execute("SET runbook.route = hybrid")
    both = long_articles.execute(
        "SELECT id, chunk_start FROM search_articles('cookie leaks', %s::real[], 20)", [vector]
    ).fetchall()
    assert len({key for key, _ in both}) == 20 and all(start >= 1 for _, start in both)


def test_exact_answers_agree_by_stream_by_sql_and_by_hand(
    loaded: Open, long_articles: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A row's chunks in several blocks.
    monkeypatch.setattr(exact, "BLOCK_BYTES", 5000)
    phase = loaded(**APART, target={"filters": ["status"]})
    long_articles.execute("UPDATE articles SET status = 'Rare' WHERE id % 9 = 0")
    texts = ("cookie expires", "socket blocks in a loop. the password")
    queries = query_set.with_vectors(phase.params, [query_set.Query(t, t) for t in texts])
    with db.connect(phase.params, "test") as connection, connection.transaction():
        found = exact.nearest(connection, phase.params, queries, 12)
        agreed = exact.stream_agrees_with_sql(
            connection, phase.params, exact.answered(connection, phase.params, queries, 12), 12
        )
    assert agreed.verdict == "PASS", str(agreed)
    for text, answer in zip(texts, found, strict=True):
        expected = best_by_hand(long_articles, text)
        assert answer.matching == len(expected)
        assert [int(key) for key in answer.keys] == [key for _, key in expected[:12]]
        assert share(answer, [(key, 1 - s) for s, key in ((s, str(k)) for s, k in expected[:12])]) == 1.0


def test_a_changed_text_replaces_its_chunks_and_never_a_part_of_them(
    loaded: Open, long_articles: Connection, database: str
) -> None:
    phase = loaded("operate/refresh")
    long_articles.execute("UPDATE articles SET body = 'short now' WHERE id = 3")
    long_articles.execute(
        "UPDATE articles SET body = (SELECT string_agg('word' || i, ' ') FROM generate_series(1, 60) i) WHERE id = 4"
    )
    long_articles.execute("INSERT INTO articles (title, body) VALUES ('new', repeat('one more. ', 30))")
    long_articles.execute(
        "UPDATE articles SET title = '', body = ' ' WHERE id = 50; DELETE FROM articles WHERE id = 6"
    )
    over, mixed = threading.Event(), []

    def watch() -> None:
        with psycopg.connect(database, autocommit=True) as reader:
            while not over.is_set():
                mixed.extend(
                    reader.execute(
                        "SELECT id FROM articles_embedding GROUP BY id"
                        " HAVING count(DISTINCT embedding_hash) > 1 OR max(embedding_chunk) <> count(*) - 1"
                    ).fetchall()
                )

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        # Rows: new, changed twice, emptied; the deleted one has nothing left to do.
        assert refresh.apply(phase).rows == [[4, 3, 0, 0]]
    finally:
        over.set()
        thread.join()
    assert mixed == []
    assert refresh.verify(phase).passed
    assert_every_text_is_whole(long_articles)
    assert len(chunks_of(long_articles)[3]) == 1


def test_chunks_that_are_staged_later_replace_those_that_are_there(loaded: Open, long_articles: Connection) -> None:
    phase = loaded("50_backfill")
    before = long_articles.execute("SELECT id, xmin FROM articles_embedding WHERE id % 2 = 1").fetchall()
    long_articles.execute("UPDATE articles SET body = repeat('longer by far. ', 20) WHERE id % 8 = 0")
    long_articles.execute("UPDATE articles SET body = 'x' WHERE id % 12 = 6")
    long_articles.execute("DELETE FROM runbook.articles_queue")
    load_embeddings.apply(phase)
    backfill.apply(phase)
    assert load_embeddings.verify(phase).passed and backfill.verify(phase).passed
    assert_every_text_is_whole(long_articles)
    assert before == long_articles.execute("SELECT id, xmin FROM articles_embedding WHERE id % 2 = 1").fetchall()
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None and recorded["rows"] == 25 + 17


def test_keys_and_names_that_need_quoting(articles: Connection, open_phase: Open) -> None:
    articles.execute(
        """
        CREATE SCHEMA "My Schema";
        CREATE TABLE "My Schema"."Docs 50%" AS
            SELECT md5(id::text)::uuid AS "chunk", title AS "Title", body || '. ' || body AS "Body %s" FROM articles;
        ALTER TABLE "My Schema"."Docs 50%" ADD PRIMARY KEY ("chunk");
        """
    )
    phase = open_phase(
        "60_build_index",
        target={
            "name": "docs", "schema": "My Schema", "table": "Docs 50%", "key": "chunk",
            "text_columns": ["Title", "Body %s"],
        },
        vector={"column": "Vec %"},
        legacy={"query": "SELECT \"chunk\" FROM \"My Schema\".\"Docs 50%\" WHERE \"Title\" LIKE :query LIMIT :k"},
        queries={"judgements": None},
        search={"fulltext_column": None},
        **CHUNKS,
    )  # fmt: skip
    for module in (extension, expand_schema, load_embeddings, backfill, search_function, build_index):
        module.apply(phase)
    assert backfill.verify(phase).passed and build_index.verify(phase).passed
    articles.execute("SET runbook.route = vector")
    vector = toy.embed(["cookie leaks"])[0].tolist()
    got = articles.execute(
        "SELECT chunk, chunk_start FROM \"My Schema\".search_docs('x', %s::real[], 7)", [vector]
    ).fetchall()
    assert len({key for key, _ in got}) == 7 and all(start for _, start in got)
    expand_schema.undo(phase)
    left = sql.SQL("SELECT relname FROM pg_class WHERE relnamespace = '\"My Schema\"'::regnamespace ORDER BY 1")
    assert articles.execute(left).fetchall() == [("Docs 50%",), ("Docs 50%_pkey",)]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"vector": {"layout": "chunks"}}, "vector.layout: chunks and embeddings.chunks: missing do not fit"),
        (CHUNKS | {"vector": {"layout": "column"}}, "vector.layout: column and embeddings.chunks: given do not fit"),
        ({"embeddings": {"chunks": {"size": 40, "overlap": 21}}}, "overlap: 21 is more than half of size: 40"),
        ({"embeddings": {"chunks": {"size": 40, "by": "tokens"}}}, "tokenizer: the model's tokenizer.json is needed"),
        (
            {"embeddings": {"source": "table", "callable": None, "table": "a.b", "chunks": {"size": 40}}},
            "chunks: needs a model",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused(
    make_params: Callable[..., Params], sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        make_params(**sections)


@pytest.mark.parametrize("operation", ["rehearse", "compare_storage"])
def test_operations_that_need_one_vector_a_row_say_so(loaded: Open, operation: str) -> None:
    module = registry.function(f"operate.{operation}.check")
    (refused,) = [g for g in module(loaded(f"operate/{operation}")) if g.name == "operate.rows_have_one_vector"]
    assert refused.verdict == "FAIL" and "does not work with vector.layout: chunks" in refused.needed


def test_preflight_says_what_chunks_save_and_counts_them(long_articles: Connection, open_phase: Open) -> None:
    long_articles.execute("UPDATE articles SET body = rpad(body, 4000, ' word.') WHERE id % 4 = 0")
    model = {"callable": "tests.test_text_lengths:first_thousand", "chunks": {"size": 900, "title": True}}
    phase = open_phase("00_preflight", embeddings=model)
    found = preflight.facts(phase)
    assert found.chunks_a_row == pytest.approx((150 + 50 * 5) / 200, rel=0.2)
    assert preflight.expected(found, phase.connection, phase.params).rows == round(found.rows * found.chunks_a_row)
    (told,) = text_lengths.gates(phase.connection, phase.params)
    assert told.verdict == "PASS" and told.found.endswith("would never be read; in chunks, 0 %")
    assert told.figures["unread_whole_percent"] > 50


ROW = {"text": "A title\nWrite to bob@example.org or to 4111 1111 1111 1111, then wait.", "title": "A title"}


def cut(make_params: Callable[..., Params], **chunks: Any) -> list[splitting.Chunk]:
    p = make_params(embeddings={"chunks": chunks}, masking={"rules": ["email", "card"]})
    return splitting.parts(p, splitting.splitter(p), masking.rules(p.masking), ROW, Counter())


def test_masked_values_are_never_cut_and_places_are_those_of_the_text(make_params: Callable[..., Params]) -> None:
    for size in range(20, 90):
        chunks = cut(make_params, size=size)
        passages = [ROW["text"][c.start - 1 : c.start - 1 + c.length] for c in chunks]
        assert not any(digits in c.text for c in chunks for digits in ("4111", "1111", "example.org"))
        kept = [p.replace("bob@example.org", "<email>").replace("4111 1111 1111 1111", "<card>") for p in passages]
        # A placeholder may be cut, and then the whole value belongs to the passage on either side.
        assert all(k == c.text or c.text.count("<") != c.text.count(">") for k, c in zip(kept, chunks, strict=True))
        seen = {at for c in chunks for at in range(c.start - 1, c.start - 1 + c.length)}
        assert all(at in seen or not letter.strip() for at, letter in enumerate(ROW["text"]))


def test_each_chunk_begins_with_the_title_if_asked(make_params: Callable[..., Params]) -> None:
    chunks = cut(make_params, size=30, title=True)
    assert len(chunks) > 1 and all(c.text.startswith("A title") for c in chunks)
    assert not any(c.text.startswith("A title\nA title") for c in chunks)


def test_chunks_by_tokens_are_measured_by_the_models_tokenizer(make_params: Callable[..., Params]) -> None:
    tokenizer = splitting._of_wordllama()
    p = make_params(embeddings={"tokenizer": str(tokenizer), "chunks": {"size": 20, "by": "tokens"}})
    text = "One sentence of several words is here. " * 20
    found = splitting.splitter(p)(text)
    assert 5 < len(found) < 20 and all(part.startswith("One") and part.endswith("here.") for _, part in found)
    wrong = make_params(embeddings={"tokenizer": __file__, "chunks": {"size": 20, "by": "tokens"}})
    with pytest.raises(BadInput, match="of Hugging Face"):
        splitting.splitter(wrong)


def dashes_have_no_vector(texts: list[str]) -> np.ndarray:
    return toy.embed([text.replace("-", "") for text in texts])


def test_a_chunk_without_direction_is_left_out_unless_it_is_all_there_is(
    loaded: Open, long_articles: Connection
) -> None:
    line = "-" * 39
    long_articles.execute("UPDATE articles SET title = 'some words', body = %s WHERE id = 3", [f"{line}\n\nthe end"])
    long_articles.execute("UPDATE articles SET title = NULL, body = %s WHERE id = 4", [line])
    phase = loaded(embeddings={"callable": "tests.test_chunks:dashes_have_no_vector", "chunks": {"size": 40}})
    assert [c[0] for c in chunks_of(long_articles)[3]] == [0, 1]
    assert [g.name for g in load_embeddings.verify(phase).failed] == [
        "staging.every_row_with_text_is_ready",
        "staging.no_vector_was_refused",
    ]
    assert long_articles.execute("SELECT DISTINCT key FROM runbook.articles_rejected").fetchall() == [(4,)]
