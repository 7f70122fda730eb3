"""Vectors made elsewhere: each format gives the same rows, and what is wrong with a row stands beside it."""

import csv
import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from runbook_lib.benchmark.query_set import Query
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.embeddings import embedding, json_block, memory, sources
from runbook_lib.migrate import expand_schema, extension, load_embeddings
from runbook_lib.params import Params
from tests import toy
from tests.conftest import write_params

MakeParams = Callable[..., Params]
FILES = {
    "parquet": "vectors.parquet",
    "feather": "vectors.feather",
    "ipc": "vectors.arrow",
    "stream": "stream.arrow",
    "jsonl": "vectors.jsonl",
    "csv": "vectors.csv",
    "npy": "vectors.npy",
}


def write(folder: Path, kind: str, columns: dict[str, list[Any]], type_: pa.DataType | None = None) -> dict[str, Any]:
    """Writes the columns in this format; returns what the section ``embeddings`` says of it."""
    path = folder / FILES[kind]
    given: dict[str, Any] = {"source": "file", "callable": None, "file": path.name}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "csv":
        with path.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, list(columns))
            writer.writeheader()
            writer.writerows(r | {"embedding": json.dumps(r["embedding"])} for r in rows)
    elif kind == "npy":
        np.save(path, np.array(columns["embedding"], dtype=np.float32))
        (folder / "ids.txt").write_text("".join(f"{k}\n" for k in columns["id"]))
        given["ids_file"] = "ids.txt"
    else:
        vectors = pa.array(columns["embedding"], type_ or pa.list_(pa.float32()))
        table = pa.table({k: vectors if k == "embedding" else pa.array(v) for k, v in columns.items()})
        if kind == "parquet":
            pq.write_table(table, path)
        elif kind == "feather":
            pyarrow.feather.write_feather(table, path)
        else:
            make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
            with make(path, table.schema) as sink:
                sink.write_table(table)
    return given


def read(make_params: MakeParams, given: dict[str, Any], **sections: Any) -> list[sources.SourceRows]:
    p = make_params(embeddings={"batch_rows": 2} | given, **({"vector": {"dimension": 3}} | sections))
    return list(embedding.stored(p))


@pytest.mark.parametrize("kind", FILES)
def test_every_format_gives_the_same_rows_in_batches(make_params: MakeParams, tmp_path: Path, kind: str) -> None:
    vectors = np.arange(15, dtype=np.float32).reshape(5, 3)
    given = write(tmp_path, kind, {"id": [5, 4, 3, 2, 1], "embedding": vectors.tolist()})
    batches = read(make_params, given)
    assert [[int(k) for k in b.keys] for b in batches] == [[5, 4], [3, 2], [1]]
    assert np.array_equal(np.concatenate([b.vectors for b in batches]), vectors)
    assert {(b.vectors.dtype.name, b.text_hashes) for b in batches} == {("float32", None)}


@pytest.mark.parametrize(
    "type_",
    [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 3), pa.list_(pa.float16())],
    ids=str,
)
def test_every_list_of_floats_is_read(make_params: MakeParams, tmp_path: Path, type_: pa.DataType) -> None:
    vectors = list(np.arange(15, dtype=np.float16).reshape(5, 3))
    given = write(tmp_path, "parquet", {"id": [5, 4, 3, 2, 1], "embedding": vectors}, type_)
    assert np.array_equal(np.concatenate([b.vectors for b in read(make_params, given)]), vectors)


@pytest.mark.parametrize("kind", ["parquet", "stream", "jsonl", "csv"])
def test_a_row_without_a_vector_of_that_dimension_is_told_and_the_next_is_read(
    make_params: MakeParams, tmp_path: Path, kind: str
) -> None:
    given = write(tmp_path, kind, {"id": [7, 8, 9, 10], "embedding": [[1, 2], None, [4, None, 6], [7, 8, 9]]})
    first, second = read(make_params, given)
    assert first.faults == {0: "2 dimensions, 3 needed", 1: "no vector, 3 dimensions needed"}
    assert second.faults == {}
    assert np.isnan(second.vectors[0, 1]), "a NULL among the numbers is refused as NaN is"
    assert second.vectors[1].tolist() == [7, 8, 9]


def test_lines_that_are_no_rows_are_told_by_number(make_params: MakeParams, tmp_path: Path) -> None:
    (tmp_path / "vectors.jsonl").write_text('{"id": 1\n\n[1]\n{"id": 2, "embedding": [1, 2, "x"]}\n')
    found = read(make_params, {"source": "file", "callable": None, "file": "vectors.jsonl"})
    assert [(list(b.places), b.faults) for b in found] == [
        (
            [1, 3],
            {
                0: "not JSON: Expecting ',' delimiter at column 9",
                1: "a JSON list, not an object",
            },
        ),
        ([4], {0: "something other than a number among its numbers"}),
    ]
    (tmp_path / "vectors.csv").write_text('id,embedding\n1,"{1,2,3}"\n2\n3,"[4,5,6]"\n')
    first, second = read(make_params, {"source": "file", "callable": None, "file": "vectors.csv"})
    assert (first.vectors[0].tolist(), first.faults) == ([1, 2, 3], {1: "1 fields, 2 needed"})
    assert second.vectors[0].tolist() == [4, 5, 6]


ODD_LINES = [
    '{"id": 1, "embedding": [1, null, 3]}',
    '{"id": 1, "embedding": [1, 2]}',
    '{"id": 1, "embedding": null}',
    '{"embedding": [1, 2, 3]}',
    '{"id": 1, "id": 5, "embedding": [1, 2, 3]}',
    '{"id": "1", "embedding": [1, 2, 3]}',
    '{"id": "2024-01-01", "embedding": [1, 2, 3]}',
    '{"id": 1.0, "embedding": [1, 2, 3]}',
    '{"id": true, "embedding": [1, 2, 3]}',
    '{"id": 99999999999999999999, "embedding": [1, 2, 3]}',
    '{"id": null, "embedding": [1, 2, 3]}',
    *(f'{{"id": 1, "embedding": [1, 2, {number}]}}' for number in (
        ".5", "5.", "05", "+5", "-", "1e", "NaN", "-Infinity", "1e39", "1e400", "1_0", "0x1", '"1"', "true", "[1]",
        "{}", "-0.0", "1e-50", "0.1000000000000000055511151231257827", "3,",
    )),
    '{"id": 1, "embedding": {"a": 1}}',
    '{"id": 1, "embedding": "[1, 2, 3]"}',
    '{"id": 1, "embedding": "{1, 2, 3}"}',
    '{"id": 1, "embedding": [1, 2, 3]} {"id": 5, "embedding": [1, 2, 3]}',
    '{"id": 1, "embedding": [1, 2, 3],}',
    '{"id": 1, "embedding": [1, 2, 3], "x": {}',
    '{"id": 1, "embedding": [1, 2, 3]}\x00',
    '{"id": 1, "embedding": [1, 2, 3], "text": "a\\u0000b"}',
    '{"id": 1, "embedding": [1, 2, 3], "text": "a\\ud800b"}',
    '{"id": 1, "embedding": [1, 2, 3], "text": 5}',
    '{"id": 1, "embedding": [1, 2, 3], "text": null}',
    '{"id": 1, "embedding": [1, 2, 3], "t\\u0065xt": "words"}',
    '{"id": 1, "embedding": [1, 2, 3], "text_hash": "00"}',
    '{"id": 1, "embedding": [1, 2, 3], "other": {"text": "words", "deep": [[[[1]]]]}}',
    '[1, 2, 3]', '5', '{}', "{'id': 1}", "}{",
]  # fmt: skip


def as_compared(batches: list[sources.SourceRows]) -> list[Any]:
    """Everything of these rows, NaN being equal to NaN."""
    return [
        (list(b.places), [(type(k), k) for k in b.keys], str(b.vectors.tolist()), b.faults, b.text_hashes)
        for b in batches
    ]


@pytest.mark.parametrize("line", ODD_LINES)
def test_lines_read_at_once_are_what_they_are_line_by_line(
    make_params: MakeParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    sound = '{"id": 2, "embedding": [4.25, -5e-3, 6]}'
    (tmp_path / "vectors.jsonl").write_text("\n".join([sound, line, "", sound, sound, line, line]))
    given = {"source": "file", "callable": None, "file": "vectors.jsonl", "batch_rows": 3}
    at_once = read(make_params, given)
    with monkeypatch.context() as patch:
        patch.setattr(json_block, "objects", lambda lines, schema: None)
        assert as_compared(at_once) == as_compared(read(make_params, given))


@pytest.mark.parametrize(
    "vector",
    ["[1,2,3]", " [1, 2, 3] ", "{1,2,3}", "[1,2]", "", "null", "[1,2,3", "1,2,3", "[1,2,3]]", "[[1,2,3]]", "[.5,1,2]",
     "[01,2,3]", "[1,NULL,3]", "[1,null,3]", "[NaN,1,2]", "[1,2,3],", '[1,2,"3"]', "[1,2,3]}{[4,5,6]", "[true,2,3]",
     "[1e400,2,3]", "[1,2,3]\n", "[1;2;3]", "(1,2,3)", "[１,2,3]", "[1,2,3]//", "[1 2 3]", '[1,2,3]},"v":[4,5,6]'],
)  # fmt: skip
def test_vectors_read_at_once_are_what_they_are_one_by_one(
    make_params: MakeParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vector: str
) -> None:
    with (tmp_path / "vectors.csv").open("w", newline="") as lines:
        rows = [("id", "embedding"), (1, "[4.25,-5e-3,6]"), (2, vector), (3, "[7,8,9]"), (4, "[0.1,0.2,0.3]")]
        csv.writer(lines).writerows(rows)
    given = {"source": "file", "callable": None, "file": "vectors.csv", "batch_rows": 3}
    at_once = read(make_params, given)
    with monkeypatch.context() as patch:
        patch.setattr(json_block, "objects", lambda lines, schema: None)
        assert as_compared(at_once) == as_compared(read(make_params, given))


@pytest.mark.parametrize("kind", ["smallint", "integer", "bigint", "uuid", "text"])
def test_keys_read_at_once_are_what_they_are_one_by_one(kind: str) -> None:
    values = [1, "2", " 3 ", "4_0", -7, 40000, 3_000_000_000, 2**63, True, 1.0, None, b"x", b"0" * 16, "", "x", "1",
              "a\0", "\ud800", str(uuid.UUID(int=5)), uuid.UUID(int=5), "0" * 32, "٣"]  # fmt: skip
    read_one = sources.key_reader(kind)
    for pair in itertools.product(values, repeat=2):
        try:
            expected = [read_one(value) for value in pair]
        except ValueError:
            expected = []
        known = expected if len(set(expected)) == 2 else None
        assert sources.read_at_once((kind,), list(pair)) == known, pair


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_hash_or_the_text_says_what_a_vector_was_made_of(
    make_params: MakeParams, tmp_path: Path, kind: str
) -> None:
    whole = hashlib.sha256(b"words").hexdigest()
    columns = {"id": [1, 2], "embedding": [[1, 2, 3]] * 2, "text_hash": [whole[:32], whole]}
    assert read(make_params, write(tmp_path, kind, columns))[0].text_hashes == [sources.hash_of("words")] * 2
    columns = {"id": [1, 2], "embedding": [[1, 2, 3]] * 2, "text": ["words", "more"]}
    hashes = [sources.hash_of("words"), sources.hash_of("more")]
    assert read(make_params, write(tmp_path, kind, columns))[0].text_hashes == hashes
    columns = {"id": [1, 2], "embedding": [[1, 2, 3]] * 2, "text_hash": ["abc", whole]}
    assert read(make_params, write(tmp_path, kind, columns))[0].faults == {0: "text_hash is not the hex of 16 bytes"}


@pytest.mark.parametrize(
    ("columns", "found", "needed"),
    [
        ({"key": [7], "embedding": [[1, 2, 3]]}, "columns key, embedding", "columns id and embedding"),
        ({"id": [7], "embedding": ["[1,2,3]"]}, "embedding is string", "list of float"),
    ],
)
def test_a_file_whose_rows_cannot_be_told_is_bad_input(
    make_params: MakeParams, tmp_path: Path, columns: dict[str, Any], found: str, needed: str
) -> None:
    given = write(tmp_path, "parquet", columns, pa.string() if "string" in found else None)
    with pytest.raises(BadInput) as error:
        read(make_params, given)
    assert str(error.value).splitlines()[1:4] == [
        f"FAIL    embed.file_is_readable   {tmp_path / 'vectors.parquet'}",
        f"  found   {found}",
        f"  needed  {needed}",
    ]


@pytest.mark.parametrize("kind", ["parquet", "ipc", "csv"])
def test_a_column_that_is_there_twice_is_bad_input(make_params: MakeParams, tmp_path: Path, kind: str) -> None:
    given = write(tmp_path, kind, {"id": [7], "embedding": [[1, 2, 3]], "other": [[4, 5, 6]]})
    path = tmp_path / FILES[kind]
    if kind == "csv":
        path.write_text(path.read_text().replace("other", "embedding"))
    else:
        read_table, write_table = {
            "parquet": (pq.read_table, pq.write_table),
            "ipc": (pyarrow.feather.read_table, pyarrow.feather.write_feather),
        }[kind]
        write_table(read_table(path).rename_columns(["id", "embedding", "embedding"]), path)
    with pytest.raises(BadInput, match="found   columns id, embedding, embedding"):
        read(make_params, given)


@pytest.mark.parametrize(("kind", "needed"), [("parquet", "a Parquet file"), ("ipc", "an Arrow file")])
def test_a_file_of_another_kind_is_bad_input(make_params: MakeParams, tmp_path: Path, kind: str, needed: str) -> None:
    (tmp_path / FILES[kind]).write_text("id,embedding\n")
    with pytest.raises(BadInput, match=f"needed  {needed}"):
        read(make_params, {"source": "file", "callable": None, "file": FILES[kind]})


def test_ids_that_do_not_match_the_vectors_are_bad_input(make_params: MakeParams, tmp_path: Path) -> None:
    given = write(tmp_path, "npy", {"id": [1, 2, 3], "embedding": [[1, 2, 3]] * 3})
    (tmp_path / "ids.txt").write_text("1\n2\n")
    with pytest.raises(BadInput, match="2 keys for 3 vectors"):
        read(make_params, given)
    (tmp_path / "ids.txt").write_text("1\n2\n3\n4\n")
    with pytest.raises(BadInput, match="more than 4 keys for 3 vectors"):
        read(make_params, given)


class Runs:
    """What a hostile pickle is made of: it runs a command where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.attack
@pytest.mark.parametrize("name", ["vectors.npy", "ids.npy"])
@pytest.mark.parametrize("disguise", ["objects", "raw pickle", "archive", "header"])
def test_nothing_is_unpickled(make_params: MakeParams, tmp_path: Path, name: str, disguise: str) -> None:
    trace = tmp_path / "it ran"
    given = write(tmp_path, "npy", {"id": [1, 2], "embedding": [[1, 2, 3]] * 2}) | {"ids_file": "ids.npy"}
    np.save(tmp_path / "ids.npy", np.array([1, 2]))
    if disguise == "objects":
        np.save(tmp_path / name, np.array([Runs(trace), Runs(trace)], dtype=object), allow_pickle=True)
    elif disguise == "raw pickle":
        (tmp_path / name).write_bytes(pickle.dumps(Runs(trace)))
    elif disguise == "archive":
        np.savez(tmp_path / "archive.npz", np.ones(2))
        (tmp_path / "archive.npz").rename(tmp_path / name)
    else:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole.replace(b"(2,", b"((("))
    with pytest.raises(BadInput, match=r"needed  an \.npy file"):
        read(make_params, given)
    assert not trace.exists()


@pytest.mark.attack
@pytest.mark.parametrize("kind", ["ipc", "stream"])
def test_an_arrow_file_that_points_beyond_its_end_is_bad_input(
    make_params: MakeParams, tmp_path: Path, kind: str
) -> None:
    given = write(tmp_path, kind, {"id": [1, 2], "embedding": [[1, 2, 3], [4, 5, 6]]})
    path = tmp_path / FILES[kind]
    offsets = np.array([0, 3, 6], dtype=np.int32).tobytes()
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(path.read_bytes().replace(offsets, np.array([0, 3, 2**30], dtype=np.int32).tobytes()))
    with pytest.raises(BadInput, match="needed  an Arrow file"):
        read(make_params, given)


# In a process of its own: allocators keep what other tests have freed, and a limit of the system does not reach that.
UNPACK = """
import resource
import sys
from pathlib import Path
from runbook_lib.core.gates import BadInput
from runbook_lib.core.target import load_params
from runbook_lib.embeddings import embedding, memory

memory.MOST_BYTES_A_BATCH = 32 * 1024**2
limit = resource.getrlimit(resource.RLIMIT_DATA)
try:
    list(embedding.stored(load_params(Path(sys.argv[1]))))
except BadInput as refused:
    print(refused)
assert resource.getrlimit(resource.RLIMIT_DATA) == limit
"""


@pytest.mark.attack
@pytest.mark.skipif(not memory.SIZES.exists(), reason="only Linux counts what a process allocates")
@pytest.mark.parametrize("kind", ["parquet", "feather", "stream", "a text for all rows"])
def test_a_small_file_that_unpacks_to_more_than_memory_is_bad_input(tmp_path: Path, kind: str) -> None:
    """Lists of one number again and again, or one long text in every row, in a few KB."""
    if kind == "a text for all rows":
        table = pa.table({"id": range(64), "embedding": [[1.0, 2, 3]] * 64, "text": ["x" * 2**20] * 64})
    else:
        zeros = pa.array(np.zeros(2**24, dtype=np.float32))
        table = pa.table({"id": [1], "embedding": pa.ListArray.from_arrays([0, len(zeros)], zeros)})
    path = tmp_path / FILES.get(kind, "vectors.parquet")
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression="zstd")
    elif kind == "feather":
        pyarrow.feather.write_feather(table, path, compression="zstd")
    else:
        with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as sink:
            sink.write_table(table)
    assert path.stat().st_size < 10_000
    given = {"source": "file", "callable": None, "file": path.name, "batch_rows": 1000}
    params_file = write_params(tmp_path, embeddings=given, vector={"dimension": 3})
    command = [sys.executable, "-c", UNPACK, str(params_file)]
    # Arrow's own pool keeps what was freed, too.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "found   rows that unpack to more than 0.0 GB" in done.stdout


@pytest.mark.attack
@pytest.mark.parametrize(
    ("rest", "fault"),
    [
        ('"embedding": ' + "[" * 100_000, "not JSON: too many brackets within each other"),
        ('"embedding": [' + "1" * 5000 + ", 2, 3]}", "not JSON: a number of too many digits"),
        ('"embedding": "' + "[" * 100_000 + '"}', "no vector, 3 dimensions needed"),
        ('"embedding": "[' + "1" * 5000 + ',2,3]"}', "no vector, 3 dimensions needed"),
        ('"embedding": [1, 2, 3], "text_hash": 9999999999999}', "text_hash is not the hex of 16 bytes"),
        ('"embedding": [1, 2, 3], "text": 7}', "its text: no text"),
    ],
    ids=["brackets", "digits", "brackets in a text", "digits in a text", "a hash of 9 TB", "a number for a text"],
)
def test_a_line_that_is_made_to_break_the_reader_is_told_as_others_are(
    make_params: MakeParams, tmp_path: Path, rest: str, fault: str
) -> None:
    (tmp_path / "vectors.jsonl").write_text('{"id": 1, ' + rest + '\n{"id": 2, "embedding": [1, 2, 3]}\n')
    (found,) = read(make_params, {"source": "file", "callable": None, "file": "vectors.jsonl"})
    assert found.faults == {0: fault} | ({1: "text_hash is not the hex of 16 bytes"} if "hash" in fault else {})


@pytest.mark.attack
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_without_an_end_is_bad_input(
    make_params: MakeParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    given = write(tmp_path, kind, {"id": [1], "embedding": [[1, 2, 3]]})
    with (tmp_path / FILES[kind]).open("a") as file:
        file.write("x" * 2000)
    with pytest.raises(BadInput, match="line 2 has more than 1000 characters" if kind == "jsonl" else "line 3 has"):
        read(make_params, given)


@pytest.mark.parametrize(
    ("kind", "value", "key"),
    [
        ("bigint", "12", 12),
        ("bigint", 2**63, None),
        ("integer", 2**31, None),
        ("integer", "1.5", None),
        ("bigint", True, None),
        ("bigint", None, None),
        ("uuid", "00000000-0000-0000-0000-00000000000a", uuid.UUID(int=10)),
        ("uuid", "no uuid", None),
        ("text", 7, "7"),
        ("text", None, None),
        ("text", "a\0b", None),
    ],
)
def test_a_key_is_read_as_the_table_has_it_or_not_at_all(kind: str, value: Any, key: Any) -> None:
    read_key = sources.key_reader(kind)
    if key is None:
        with pytest.raises(ValueError):
            read_key(value)
    else:
        assert read_key(value) == key


@pytest.mark.parametrize(
    "given", ["5", '"ab"', '{"a": 1, "b": 2}', "[1]", "[1, 2, 3]", "[[1], 2]", "[null, 2]", "no"]
)
def test_what_is_no_list_of_a_value_a_column_is_no_key_of_several(given: str) -> None:
    with pytest.raises(ValueError):
        sources.key_reader("text", "bigint")(given)


def test_queries_find_their_vectors_in_their_own_file(make_params: MakeParams, tmp_path: Path) -> None:
    given = write(tmp_path, "parquet", {"id": [1], "embedding": [[1, 2, 3]]})
    (tmp_path / "asked.jsonl").write_text(
        '{"query_id": "q2", "embedding": [4, 5, 6]}\n{"query_id": "q1", "embedding": [1, 2, 3]}\n'
    )
    p = make_params(embeddings=given, vector={"dimension": 3}, queries={"embeddings": "asked.jsonl"})
    queries = [Query("q1", "a"), Query("q2", "b")]
    assert embedding.query_vectors(p, queries).tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(BadInput, match="no vector for 1 queries: q3"):
        embedding.query_vectors(p, [*queries, Query("q3", "c")])
    with pytest.raises(BadInput, match=r"or give queries\.embeddings for the queries"):
        embedding.query_vectors(make_params(embeddings=given, vector={"dimension": 3}), queries)


def corpus(articles: psycopg.Connection[Any]) -> dict[str, list[Any]]:
    rows = articles.execute(
        "SELECT id, concat_ws(E'\\n', title, body) FROM articles WHERE title IS NOT NULL ORDER BY id"
    ).fetchall()
    return {"id": [r[0] for r in rows], "embedding": toy.embed([r[1] for r in rows]).tolist()}


@pytest.fixture
def ready(open_phase: Callable[..., Phase]) -> Callable[..., Phase]:
    """Opens phase 40 on a table that has the columns, with vectors made elsewhere."""

    def make(given: dict[str, Any], **more: Any) -> Phase:
        phase = open_phase("40_load_embeddings", embeddings={"batch_rows": 30} | given | more)
        extension.apply(phase)
        expand_schema.apply(phase)
        return phase

    return make


@pytest.mark.parametrize("kind", FILES)
def test_every_format_is_staged_and_a_second_load_stages_nothing(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], tmp_path: Path, kind: str
) -> None:
    phase = ready(write(tmp_path, kind, corpus(articles)))
    assert load_embeddings.apply(phase).rows[0][:2] == (toy.ROWS, 0)
    assert load_embeddings.verify(phase).passed
    assert load_embeddings.apply(phase).rows[0][:2] == (0, 0)
    wrong = articles.execute(
        "SELECT count(*) FROM articles a JOIN runbook.articles_staging s ON s.key = a.id"
        " WHERE s.text_hash <> substring(sha256(convert_to(concat_ws(E'\\n', title, body), 'UTF8')) for 16)"
    ).fetchone()
    assert wrong == (0,)


def test_a_file_load_that_is_stopped_goes_on_where_it_was(
    ready: Callable[..., Phase],
    articles: psycopg.Connection[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phase = ready(write(tmp_path, "parquet", corpus(articles)))
    check, seen = embedding.check, list[int]()

    def stopping(vectors: np.ndarray, params: Params) -> dict[int, str]:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(vectors))
        return check(vectors, params)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "check", stopping)
        with pytest.raises(KeyboardInterrupt):
            load_embeddings.apply(phase)
    assert seen == [30, 30, 30]
    assert load_embeddings.apply(phase).rows[0][:2] == (toy.ROWS - 90, 0)
    assert load_embeddings.verify(phase).passed


def test_every_row_that_goes_nowhere_is_kept_with_its_reason(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    columns = corpus(articles)
    texts = dict(articles.execute("SELECT id, concat_ws(E'\\n', title, body) FROM articles").fetchall())
    columns["id"] = [str(k) for k in columns["id"]]
    columns["text"] = [texts[int(k)] for k in columns["id"]]
    columns["text"][4] = "an older text"
    columns["embedding"][5] = [1.0]
    columns["embedding"][6] = [0.0] * toy.DIMENSION
    columns["embedding"][7] = [float("nan")] * toy.DIMENSION
    for key in ("x7", "9999", "1", "100"):
        columns["id"].append(key)
        columns["embedding"].append([1.0] * toy.DIMENSION)
        columns["text"].append(texts.get(int(key) if key.isdigit() else 0, ""))
    phase = ready(write(tmp_path, "parquet", columns))
    load_embeddings.apply(phase)
    found = load_embeddings.verify(phase).failed
    assert [g.name for g in found] == ["staging.every_row_with_text_is_ready", "staging.no_vector_was_refused"]
    assert str(found[1]) == (
        'FAIL    staging.no_vector_was_refused   "runbook"."articles_rejected"\n'
        "  found   2 × its key occurs again (for instance key 1, vectors.parquet row 203:"
        " an earlier row has this key);"
        " 1 × NaN or infinity among its numbers (for instance key 8);"
        " 1 × a zero vector, which cosine cannot rank (for instance key 7);"
        " 1 × its key is no bigint (for instance key x7, vectors.parquet row 201: id is bigint);"
        " 1 × its vector cannot be read (for instance key 6, vectors.parquet row 6: 1 dimensions, 8 needed);"
        " 1 × made from a text that the row no longer has (for instance key 5, vectors.parquet row 5);"
        " 1 × no row of the table has its key (for instance key 9999, vectors.parquet row 202)\n"
        "  needed  none\n"
        "  danger  these rows would have no vector, or that of another row's text\n"
        "  do      fix the source of these embeddings and run this phase again; it tries them again"
    )
    first = articles.execute("SELECT embedding::real[] FROM runbook.articles_staging WHERE key = 1").fetchone()
    assert first is not None and np.allclose(first[0], columns["embedding"][0]), "the first of two is kept"


def test_refused_rows_that_were_accepted_do_not_stop_a_load_that_lacks_nothing(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    columns = corpus(articles)
    columns["id"].append(9999)
    columns["embedding"].append([1.0] * toy.DIMENSION)
    phase = ready(write(tmp_path, "jsonl", columns), accept_refused_rows=1)
    load_embeddings.apply(phase)
    gates = load_embeddings.verify(phase)
    assert gates.passed
    assert (gates.gates[2].figures, gates.gates[2].needed) == (
        {"refused": 1, "accepted": 1},
        "at most 1, as embeddings.accept_refused_rows says",
    )


@pytest.mark.parametrize("type_", ["vector", "halfvec(8)", "real[]", "float8[]"])
def test_vectors_of_another_table_are_staged(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], type_: str
) -> None:
    phase = ready({"source": "table", "callable": None, "table": "public.made_elsewhere"})
    columns = corpus(articles)
    cast = "::real[]::" if type_ != "float8[]" else "::"
    articles.execute(f"CREATE TABLE made_elsewhere (id bigint, embedding {type_})")
    articles.execute("CREATE INDEX ON made_elsewhere (id)")
    with articles.cursor() as cursor:
        values = [*zip(columns["id"], columns["embedding"], strict=True), (None, [1.0] * 8), (3, [1.0] * 8)]
        cursor.executemany(f"INSERT INTO made_elsewhere VALUES (%s, (%s{cast}{type_}))", values)
    assert load_embeddings.apply(phase).rows[0][:2] == (toy.ROWS, 2)
    assert {r["reason"] for r in phase.connection.execute("SELECT reason FROM runbook.articles_rejected")} == {
        "its key occurs again",
        "its key is no bigint",
    }
    assert load_embeddings.apply(phase).rows[0][:2] == (0, 2)


def test_a_table_of_vectors_that_cannot_be_read_is_bad_input(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready({"source": "table", "callable": None, "table": "public.made_elsewhere"})
    with pytest.raises(BadInput, match="found   no such table"):
        load_embeddings.apply(phase)
    articles.execute("CREATE TABLE made_elsewhere (id bigint, embedding real[])")
    with pytest.raises(BadInput, match="found   no index on id"):
        load_embeddings.apply(phase)


@pytest.mark.parametrize("kind", ["smallint", "integer", "uuid", "text"])
@pytest.mark.parametrize("vector_type", ["vector", "halfvec"])
def test_keys_of_every_type_are_packed_or_written_as_they_are(
    open_phase: Callable[..., Phase], articles: psycopg.Connection[Any], kind: str, vector_type: str
) -> None:
    using = "lpad(id::text, 32, '0')::uuid" if kind == "uuid" else f"id::{kind}"
    articles.execute("ALTER TABLE articles ALTER id DROP IDENTITY")
    articles.execute(f"ALTER TABLE articles ALTER id TYPE {kind} USING {using}")
    phase = open_phase("40_load_embeddings", vector={"type": vector_type})
    extension.apply(phase)
    expand_schema.apply(phase)
    load_embeddings.apply(phase)
    rows = articles.execute(
        "SELECT concat_ws(E'\\n', a.title, a.body), s.embedding::vector::real[]"
        " FROM articles a JOIN runbook.articles_staging s ON s.key = a.id"
    ).fetchall()
    assert len(rows) == toy.ROWS
    assert np.allclose([r[1] for r in rows], toy.embed([r[0] for r in rows]), atol=1e-3)
