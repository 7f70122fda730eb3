"""Phase 40: every row with text staged once, whatever stops the load."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest

from runbook_lib.core.phase import Phase
from runbook_lib.embeddings import embedding
from runbook_lib.migrate import expand_schema, extension, load_embeddings
from tests import toy

Open = Callable[..., Phase]


@pytest.fixture
def ready(open_phase: Open) -> Callable[..., Phase]:
    """Opens phase 40 on a table that has the columns."""

    def make(**sections: dict[str, Any]) -> Phase:
        phase = open_phase("40_load_embeddings", **sections)
        extension.apply(phase)
        expand_schema.apply(phase)
        return phase

    return make


def staged(phase: Phase) -> int:
    row = phase.connection.execute("SELECT count(*) AS n, count(DISTINCT key) AS d FROM runbook.articles_staging")
    counts = row.fetchone()
    assert counts is not None and counts["n"] == counts["d"], "a key was staged twice"
    return int(counts["n"])


def test_every_row_with_text_is_staged_once(ready: Callable[..., Phase]) -> None:
    phase = ready(embeddings={"batch_rows": 30})
    load_embeddings.apply(phase)
    assert staged(phase) == toy.ROWS, "the row without text is left out"
    assert [g.verdict for g in load_embeddings.verify(phase)] == ["PASS"] * 3


def test_staged_vectors_are_those_of_the_model(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    load_embeddings.apply(phase)
    rows = articles.execute(
        "SELECT concat_ws(E'\\n', a.title, a.body), s.embedding::real[], s.text_hash"
        " FROM articles a JOIN runbook.articles_staging s ON s.key = a.id ORDER BY a.id"
    ).fetchall()
    assert np.allclose([r[1] for r in rows], toy.embed([r[0] for r in rows]), atol=1e-6)
    assert rows[0][2] == __import__("hashlib").sha256(rows[0][0].encode()).digest()[:16]


def test_a_model_whose_lengths_mean_nothing_is_staged_at_length_1(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    given = {"source": "callable", "callable": "tests.test_embedding:long_vectors", "normalise": True}
    load_embeddings.apply(ready(embeddings=given, vector={"distance": "inner_product"}))
    lengths = articles.execute("SELECT vector_norm(embedding) FROM runbook.articles_staging").fetchall()
    assert len(lengths) == toy.ROWS and all(abs(length - 1) < 1e-6 for (length,) in lengths)


def test_a_stopped_load_goes_on_where_it_was(ready: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch) -> None:
    phase = ready(embeddings={"batch_rows": 30})
    asked: list[str] = []

    def failing(texts: list[str]) -> np.ndarray:
        if len(asked) == 90:
            raise KeyboardInterrupt
        asked.extend(texts)
        return toy.embed(texts)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "model", lambda params: failing)
        with pytest.raises(KeyboardInterrupt):
            load_embeddings.apply(phase)
    assert staged(phase) == 90
    monkeypatch.setattr(toy, "embed", lambda texts, embed=toy.embed: asked.extend(texts) or embed(texts))
    load_embeddings.apply(phase)
    assert (staged(phase), len(asked)) == (toy.ROWS, toy.ROWS), "nothing lost, nothing embedded twice"


def test_the_next_batch_is_embedded_while_the_last_is_copied(
    ready: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase, second, asked = ready(embeddings={"batch_rows": 30}), threading.Event(), list[int]()
    copy = load_embeddings.copy

    def embed(texts: list[str]) -> np.ndarray:
        asked.append(len(texts))
        if len(asked) == 2:
            second.set()
        return toy.embed(texts)

    def waiting(*given: Any) -> Any:
        assert second.wait(60), "the second batch was not embedded before the first was copied"
        return copy(*given)

    monkeypatch.setattr(embedding, "model", lambda params: embed)
    monkeypatch.setattr(load_embeddings, "copy", waiting)
    load_embeddings.apply(phase)
    assert staged(phase) == toy.ROWS


def test_a_copy_that_fails_ends_the_load_and_the_next_resumes(
    ready: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase, asked = ready(embeddings={"batch_rows": 10}), list[int]()
    copy, calls = load_embeddings.copy, list[int]()

    def failing(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise psycopg.errors.DiskFull("no space left on device")
        return copy(*given)

    def embed(texts: list[str]) -> np.ndarray:
        asked.append(len(texts))
        return toy.embed(texts)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "model", lambda params: embed)
        patch.setattr(load_embeddings, "copy", failing)
        with pytest.raises(psycopg.errors.DiskFull):
            load_embeddings.apply(phase)
    assert len(asked) <= 2 + load_embeddings.MOST_BATCHES_AHEAD, "the model did not work on for nothing"
    assert not [t for t in threading.enumerate() if t.name.startswith("copy")], "no thread is left behind"
    load_embeddings.apply(phase)
    assert staged(phase) == toy.ROWS


def test_a_text_changed_after_staging_is_staged_anew(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    load_embeddings.apply(phase)
    articles.execute("UPDATE articles SET body = 'quite other words' WHERE id = 1")
    assert load_embeddings.verify(phase).passed, "it waits in the queue"
    load_embeddings.apply(phase)
    found = articles.execute("SELECT embedding::real[] FROM runbook.articles_staging WHERE key = 1").fetchone()
    assert found is not None
    assert np.allclose(found[0], toy.embed(["cookie leaks\nquite other words"])[0], atol=1e-6)


def test_a_row_lost_by_the_triggers_fails_the_gate(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    load_embeddings.apply(phase)
    articles.execute("ALTER TABLE articles DISABLE TRIGGER USER; UPDATE articles SET body = 'unseen' WHERE id = 1")
    assert str(load_embeddings.verify(phase).failed[0]) == (
        "FAIL    staging.every_row_with_text_is_ready   public.articles\n"
        "  found   199 of 200 rows with text have its vector, 0 changed since and are queued, 1 have none\n"
        "  needed  every row has one or is queued\n"
        "  danger  rows without a vector are never found by the new search\n"
        "  do      run this phase again; it stages only what is missing"
    )


def test_refused_vectors_are_kept_with_their_reason_and_tried_again(
    ready: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = ready()

    def holes(texts: list[str]) -> np.ndarray:
        vectors = toy.embed(texts)
        vectors[3] = np.nan
        vectors[5] = 0
        return vectors

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "model", lambda params: holes)
        load_embeddings.apply(phase)
    refused = {g.name: g for g in load_embeddings.verify(phase)}["staging.no_vector_was_refused"]
    assert str(refused) == (
        'FAIL    staging.no_vector_was_refused   "runbook"."articles_rejected"\n'
        "  found   1 × NaN or infinity among its numbers (for instance key 4);"
        " 1 × a zero vector, which cosine cannot rank (for instance key 6)\n"
        "  needed  none\n"
        "  danger  these rows would have no vector, or that of another row's text\n"
        "  do      fix the source of these embeddings and run this phase again; it tries them again"
    )
    load_embeddings.apply(phase)
    assert load_embeddings.verify(phase).passed


def test_halfvec_and_text_keys(ready: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    articles.execute("ALTER TABLE articles ALTER id DROP IDENTITY; ALTER TABLE articles ALTER id TYPE text")
    phase = ready(vector={"type": "halfvec"})
    load_embeddings.apply(phase)
    assert staged(phase) == toy.ROWS
    assert load_embeddings.verify(phase).passed


def test_without_execute_nothing_is_staged(open_phase: Open) -> None:
    phase = open_phase("40_load_embeddings", execute=False)
    assert "not carried out" in str(load_embeddings.apply(phase))
    assert phase.connection.execute("SELECT to_regclass('runbook.articles_staging') AS t").fetchone() == {"t": None}
