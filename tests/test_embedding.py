"""Models and their vectors: what is refused, in which words, and what is let through."""

import ctypes
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runbook_lib.benchmark import query_set
from runbook_lib.core.gates import BadInput
from runbook_lib.embeddings import embedding
from runbook_lib.params import Params
from tests import toy

MakeParams = Callable[..., Params]


def long_vectors(texts: list[str]) -> np.ndarray:
    """As the toy model, at lengths of 1, 2, 3, …"""
    return toy.embed(texts) * np.arange(1, len(texts) + 1, dtype=np.float32)[:, None]


def one_for_all(texts: list[str]) -> np.ndarray:
    return toy.embed(["a"])


def broken(texts: list[str]) -> np.ndarray:
    raise OSError("no GPU")


def ragged(texts: list[str]) -> Any:
    return [[1.0] * len(text) for text in texts]


def words(texts: list[str]) -> Any:
    return [["one", "two"]] * len(texts)


def none_left(texts: list[str]) -> Any:
    vectors = toy.embed(texts)
    texts.clear()
    return vectors


def of_two_dimensions(texts: list[str]) -> np.ndarray:
    return np.ones((len(texts), len(texts)))


def talks(texts: list[str]) -> np.ndarray:
    print(texts)
    sys.stderr.write(texts[0])
    os.write(1, texts[0].encode())
    ctypes.CDLL(None).puts(texts[0].encode())
    subprocess.run(["sh", "-c", f"echo {texts[0]}; echo {texts[0]} >&2"], check=True)
    return toy.embed(texts)


def closes(texts: list[str]) -> np.ndarray:
    sys.stdout.close()
    os.close(1)
    return toy.embed(texts)


# What fork() has said to the test's own process: the child of the last call.
FORKED: list[int] = []


def forks(texts: list[str]) -> np.ndarray:
    FORKED[:] = [os.fork()]
    return toy.embed(texts)


def quotes(texts: list[str]) -> np.ndarray:
    raise ValueError("cannot take " + " ".join(texts))


def source(callable_: str) -> dict[str, Any]:
    return {"source": "callable", "callable": callable_}


def test_a_callable_gives_one_float32_vector_a_text(make_params: MakeParams) -> None:
    model = embedding.model(make_params())
    vectors = model(["the cookie", "a buffer"])
    assert (vectors.shape, vectors.dtype) == ((2, toy.DIMENSION), np.float32)
    assert np.array_equal(vectors, toy.embed(["the cookie", "a buffer"]))


def test_wordllama_gives_vectors_of_length_one_without_a_download(make_params: MakeParams) -> None:
    p = make_params(embeddings={"source": "wordllama", "callable": None}, vector={"dimension": 256})
    vectors = embedding.model(p)(["a cookie expires", "a session expires", "heap overflow"])
    assert vectors.shape == (3, 256)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert (embedding.check_dimension(p).verdict, embedding.check_distance(p).verdict) == ("PASS", "PASS")


def test_one_long_text_takes_no_memory_for_the_short_ones_beside_it(make_params: MakeParams) -> None:
    p = make_params(embeddings={"source": "wordllama", "callable": None}, vector={"dimension": 256})
    embed = embedding.model(p)
    texts = [f"a short text, number {i}" for i in range(130)]
    texts[7] = "a long one of many words. " * 2000
    alone = np.vstack([embed([text]) for text in texts])
    tracemalloc.start()
    try:
        together = embed(texts)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.allclose(together, alone, atol=1e-6)
    # Its own tokens take 14 MB; as many for each of 64 texts would take 64 times as much.
    assert peak < 150 * 2**20


def test_wordllama_on_an_empty_text_is_set_aside_with_its_key(make_params: MakeParams) -> None:
    p = make_params(embeddings={"source": "wordllama", "callable": None}, vector={"dimension": 256})
    assert embedding.check(embedding.model(p)(["words", ""]), p) == {1: "NaN or infinity among its numbers"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("no_such_module:embed", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("tests.toy:embd", "AttributeError: module 'tests.toy' has no attribute 'embd'"),
        ("tests.toy:DIMENSION", "DIMENSION is of type int, not a function"),
    ],
)
def test_a_callable_that_cannot_be_loaded_is_bad_input(make_params: MakeParams, name: str, found: str) -> None:
    with pytest.raises(BadInput) as error:
        embedding.model(make_params(embeddings=source(name)))
    assert str(error.value) == (
        f"\nFAIL    embed.model_can_be_loaded   source: callable ({name})\n"
        f"  found   {found}\n"
        "  needed  a module that imports, with a function from a list of texts to an array of vectors\n"
        "  danger  no text could be embedded; nothing was started\n"
        "  do      check the spelling, and that the module is installed in this environment or on PYTHONPATH"
    )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("one_for_all", "an array of shape (1, 8) for 2 texts"),
        ("ragged", "of type list, no array of numbers, for 2 texts"),
        ("words", "of type list, no array of numbers, for 2 texts"),
        ("broken", "OSError: no GPU"),
    ],
)
def test_a_model_that_fails_on_two_texts_is_bad_input(make_params: MakeParams, name: str, found: str) -> None:
    with pytest.raises(BadInput) as error:
        embedding.check_dimension(make_params(embeddings=source(f"tests.test_embedding:{name}")))
    assert error.value.found == found


@pytest.mark.attack
def test_vectors_of_two_dimensions_are_bad_input(make_params: MakeParams) -> None:
    model = embedding.model(make_params(embeddings=source("tests.test_embedding:of_two_dimensions")))
    model(["one"])
    with pytest.raises(BadInput) as error:
        model(["one", "two"])
    assert error.value.found == "vectors of 1 and of 2 dimensions"


@pytest.mark.attack
def test_what_a_model_prints_and_does_to_the_list_stays_with_it(
    make_params: MakeParams, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor does what a C library or a child of its writes; what comes after is heard again."""
    for name in ("talks", "none_left", "closes"):
        assert embedding.model(make_params(embeddings=source(f"tests.test_embedding:{name}")))(
            ["a secret"]
        ).shape == (
            1,
            8,
        )
    os.write(1, b"after")
    os.write(2, b"it")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("after", "it")


@pytest.mark.attack
def test_a_child_that_a_model_forks_and_lets_come_back_works_on_nothing(make_params: MakeParams) -> None:
    read_end, write_end = os.pipe()
    here = os.getpid()
    embedding.model(make_params(embeddings=source("tests.test_embedding:forks")))(["a text"])
    os.write(write_end, b"x")
    if os.getpid() != here:
        os._exit(0)
    os.waitpid(FORKED[0], 0)
    os.close(write_end)
    assert os.read(read_end, 10) == b"x", "a second one came from the child"
    os.close(read_end)


@pytest.mark.attack
def test_a_model_that_is_away_is_not_heard_about_rows(make_params: MakeParams) -> None:
    with pytest.raises(embedding.ModelAway) as error:
        embedding.embed_each(quotes, ["a secret", "another"])
    assert error.value.found.startswith("ValueError on 2 texts; on 2 probe texts ValueError: cannot take a user's")
    assert "secret" not in str(error.value)


def test_a_file_is_no_model_for_new_texts(make_params: MakeParams) -> None:
    p = make_params(embeddings={"source": "file", "callable": None, "file": "vectors.parquet"})
    with pytest.raises(BadInput) as error:
        embedding.model(p)
    assert error.value.found == "vectors that were made elsewhere, and no model"


def test_a_model_of_another_dimension_does_not_fit(make_params: MakeParams) -> None:
    gate = embedding.check_dimension(make_params(vector={"dimension": 16}))
    assert str(gate) == (
        "FAIL    embed.model_dimension_fits   source: callable (tests.toy:embed)\n"
        "  found   8 dimensions\n"
        "  needed  16, the dimension of column embedding\n"
        "  danger  no vector of this model fits into the column; cutting or padding would change every distance\n"
        "  do      set vector.dimension: 8, or name the model that the column was made for"
    )
    assert embedding.check_dimension(make_params()).verdict == "PASS"


@pytest.mark.parametrize("distance", ["l2", "inner_product"])
def test_vectors_of_other_lengths_fit_cosine_alone(make_params: MakeParams, distance: str) -> None:
    unfit = source("tests.test_embedding:long_vectors")
    gate = embedding.check_distance(make_params(embeddings=unfit, vector={"distance": distance}))
    assert str(gate) == (
        "FAIL    embed.model_and_distance_fit   source: callable (tests.test_embedding:long_vectors)\n"
        f"  found   distance {distance}, vectors of length 1.000 to 2.000\n"
        "  needed  distance cosine, or vectors of length 1\n"
        f"  danger  {distance} would rank by the length of the vectors too, so that long or short texts win unasked\n"
        "  do      set vector.distance: cosine, or embeddings.normalise: true if its lengths mean nothing"
    )
    assert embedding.check_distance(make_params(embeddings=unfit)).verdict == "PASS"
    assert embedding.check_distance(make_params(vector={"distance": distance})).verdict == "PASS"
    at_length_1 = unfit | {"normalise": True}
    assert (
        embedding.check_distance(make_params(embeddings=at_length_1, vector={"distance": distance})).verdict == "PASS"
    )


def test_unit_vectors_rank_alike_under_every_distance() -> None:
    vectors = toy.embed([f"{s} {v} {p}" for s in toy.SUBJECTS for v in toy.VERBS for p in toy.PLACES])
    query = toy.embed(["the cookie expires on logout"])[0]
    by_cosine = np.argsort(-(vectors @ query), kind="stable")
    by_l2 = np.argsort(np.round(np.linalg.norm(vectors - query, axis=1), 4), kind="stable")
    assert np.allclose((vectors @ query)[by_cosine], (vectors @ query)[by_l2], atol=1e-3)


def test_each_vector_that_may_not_be_loaded_is_named_with_its_reason(make_params: MakeParams) -> None:
    vectors = np.ones((5, toy.DIMENSION), dtype=np.float32)
    vectors[1, 3], vectors[2, 0], vectors[3] = np.nan, np.inf, 0
    not_finite, zero = "NaN or infinity among its numbers", "a zero vector, which cosine cannot rank"
    assert embedding.check(vectors, make_params()) == {1: not_finite, 2: not_finite, 3: zero}
    assert embedding.check(vectors, make_params(vector={"distance": "l2"})) == {1: not_finite, 2: not_finite}


def test_numbers_whose_squares_overflow_or_vanish_are_sound(make_params: MakeParams) -> None:
    vectors = np.ones((2, toy.DIMENSION), dtype=np.float32)
    vectors[0], vectors[1] = 3e38, 1e-30
    assert embedding.check(vectors, make_params()) == {}


def test_a_wrong_dimension_refuses_every_row(make_params: MakeParams) -> None:
    vectors = np.ones((2, 3), dtype=np.float32)
    assert embedding.check(vectors, make_params()) == dict.fromkeys((0, 1), "3 dimensions, 8 needed")


def test_halfvec_refuses_what_two_bytes_cannot_hold(make_params: MakeParams) -> None:
    vectors = np.ones((3, toy.DIMENSION), dtype=np.float32)
    vectors[1, 0], vectors[2] = 70_000, 1e-9
    assert embedding.check(vectors, make_params()) == {}
    assert embedding.check(vectors, make_params(vector={"type": "halfvec"})) == {
        1: "NaN or infinity among its numbers",
        2: "a zero vector, which cosine cannot rank",
    }


def test_no_vectors_need_no_reasons(make_params: MakeParams) -> None:
    assert embedding.check(np.empty((0, toy.DIMENSION), dtype=np.float32), make_params()) == {}


def test_normalising_leaves_directions_and_what_has_none() -> None:
    vectors = np.array([[3, 4], [0, 0], [np.nan, 1], [3e30, 4e30]], dtype=np.float32)
    result = embedding.normalise(vectors)
    assert result.dtype == np.float32 and result[3].tolist() == pytest.approx([0.6, 0.8])
    assert result[0].tolist() == pytest.approx([0.6, 0.8])
    assert result[1].tolist() == [0, 0]
    assert math.isnan(result[2, 0]) and result[2, 1] == 1
    assert vectors[0].tolist() == [3, 4]


def file_params(make_params: MakeParams, tmp_path: Path, table: pa.Table, **sections: Any) -> Params:
    pq.write_table(table, tmp_path / "vectors.parquet")
    given = {"source": "file", "callable": None, "file": "vectors.parquet", "batch_rows": 2}
    return make_params(embeddings=given, vector={"dimension": 3}, **sections)


def column(rows: list[list[float | None] | None], kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(rows, kind or pa.list_(pa.float32()))


def test_dimension_and_distance_of_a_file_are_those_of_its_vectors(make_params: MakeParams, tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2], "embedding": column([[1, 0, 0], [0, 2, 0]])})
    p = file_params(make_params, tmp_path, table)
    assert embedding.check_dimension(p).verdict == "PASS"
    unfit = p.model_copy(update={"vector": p.vector.model_copy(update={"distance": "inner_product"})})
    assert embedding.check_distance(unfit).found == "distance inner_product, vectors of length 1.000 to 2.000"


def test_stored_vectors_and_those_of_queries_come_at_length_1(make_params: MakeParams, tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2, 3], "embedding": column([[3, 4, 0], [0, 2, 0], [0, 0, 0]])})
    asked = pa.table({"query_id": ["q1"], "embedding": column([[0, 0, 5]])})
    pq.write_table(asked, tmp_path / "queries.parquet")
    pq.write_table(rows, tmp_path / "vectors.parquet")
    given = {"source": "file", "callable": None, "file": "vectors.parquet", "batch_rows": 2}
    for normalise, first, query in ((False, [3, 4, 0], [0, 0, 5]), (True, [0.6, 0.8, 0], [0, 0, 1])):
        p = make_params(
            embeddings=given | {"normalise": normalise},
            vector={"dimension": 3, "distance": "inner_product"},
            queries={"embeddings": "queries.parquet"},
        )
        stored = np.concatenate([batch.vectors for batch in embedding.stored(p)])
        assert stored[0].tolist() == pytest.approx(first) and stored[2].tolist() == [0, 0, 0]
        assert embedding.query_vectors(p, [query_set.Query("q1", "x")])[0].tolist() == pytest.approx(query)


def test_an_empty_file_is_bad_input(make_params: MakeParams, tmp_path: Path) -> None:
    table = pa.table({"id": pa.array([], pa.int64()), "embedding": column([])})
    with pytest.raises(BadInput) as error:
        embedding.check_dimension(file_params(make_params, tmp_path, table))
    assert error.value.found == "no rows"
