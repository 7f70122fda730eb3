"""Parameters: typed, checked whole, every problem named with its way out, nothing secret in the record."""

import itertools
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from runbook_lib.core import names
from runbook_lib.core.gates import BadInput, Gate
from runbook_lib.core.target import load_params
from runbook_lib.params import Params, reference
from tests.conftest import write_params

DANGER = "a misread parameter would act on the wrong thing; nothing was started"
MEND = "fix the file and rerun the same command"


def _problems(path: Path) -> tuple[Gate, ...]:
    with pytest.raises(BadInput) as error:
        load_params(path)
    assert {g.verdict for g in error.value.problems} == {"FAIL"}
    return error.value.problems.gates


def _change(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = write_params(tmp_path)
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data))
    return path


def test_the_toy_file_is_valid_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    p = load_params(write_params(tmp_path))
    assert p.queries.file == tmp_path.resolve() / "queries.jsonl"
    assert p.queries.judgements == tmp_path.resolve() / "judgements.jsonl"
    assert p.function_name == "search_articles"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no.yaml"
    (problem,) = _problems(path)
    assert str(problem) == (
        f"FAIL    params.file_is_readable   {path}\n"
        "  found   No such file or directory\n"
        "  needed  a YAML file\n"
        f"  danger  {DANGER}\n"
        f"  do      {MEND}"
    )


def test_a_key_of_an_earlier_release_is_told_apart_from_a_mistyped_one(tmp_path: Path) -> None:
    path = _change(tmp_path, lambda data: data.update(rehearse={"server": "embedded"}))
    (problem,) = _problems(path)
    assert str(problem) == (
        f"FAIL    params.key_is_known   {path}: rehearse.server\n"
        "  found   a key of an earlier release\n"
        "  needed  a file without it\n"
        f"  danger  {DANGER}\n"
        "  do      take it out: samples are made in a scratch schema of the target's database; to rehearse elsewhere,"
        " point connection.dsn_env at a copy of the database"
    )


def test_a_name_that_postgresql_would_cut_is_refused_by_its_bytes(tmp_path: Path) -> None:
    def long(data: dict[str, Any]) -> None:
        data["target"]["table"] = "ü" * 32
        data.setdefault("vector", {})["column"] = "e" * 41

    table, column = _problems(_change(tmp_path, long))
    assert "64 bytes, at most 63: PostgreSQL would cut the name, or one made of it" in str(table)
    assert "41 bytes, at most 40: PostgreSQL would cut the name, or one made of it" in str(column)

    def fit(data: dict[str, Any]) -> None:
        data["target"]["table"] = "ü" * 31
        data["vector"]["column"] = "e" * 40

    p = load_params(_change(tmp_path, fit))
    made = (names.index_name(p), names.side_table_name(p), f"{p.vector.column}_updated_at")
    assert max(len(name.encode()) for name in made) <= 63 and names.index_name(p).endswith(f"_{'e' * 40}_hnsw")


@pytest.mark.parametrize(
    ("content", "found"), [("[1, 2", "while parsing"), ("- a", "list"), ("", "NoneType"), ("word", "str")]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str, found: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    (problem,) = _problems(path)
    assert problem.name == "params.file_is_yaml" and problem.found.startswith(found)


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("target: {name: café}".encode("latin-1"))
    assert _problems(path)[0].name == "params.file_is_yaml"


def test_a_misspelt_key_gets_the_nearest_name(tmp_path: Path) -> None:
    path = _change(tmp_path, lambda d: d["vector"].update(dimensions=8))
    (problem,) = _problems(path)
    assert str(problem) == (
        f"FAIL    params.key_is_known   {path}: vector.dimensions\n"
        "  found   unknown key\n"
        "  needed  a key that the runbook knows\n"
        f"  danger  {DANGER}\n"
        "  do      did you mean dimension?"
    )


def test_a_key_is_one_column_or_several_and_one_in_a_list_is_one(tmp_path: Path) -> None:
    one, several = (
        load_params(_change(tmp_path, lambda d, key=key: d["target"].update(key=key))).target  # type: ignore[misc]
        for key in (["id"], ["tenant_id", "id"])
    )
    assert (one.key, one.key_columns, one.key_shown) == ("id", ("id",), "id")
    assert several.key == several.key_columns == ("tenant_id", "id")
    assert several.key_shown == "(tenant_id, id)"


@pytest.mark.parametrize(
    ("key", "needed"),
    [
        (["id", "id"], "name each column of the key once"),
        ([], "name each column of the key once"),
        (
            ["tenant_id", "rank"],
            "the search function has an argument or a result named rank; use a generated column of another name,"
            " with a UNIQUE index",
        ),
    ],
)
def test_a_key_of_several_columns_names_each_once_and_none_of_the_functions(
    tmp_path: Path, key: list[str], needed: str
) -> None:
    (problem,) = _problems(_change(tmp_path, lambda d: d["target"].update(key=key)))
    assert (problem.name, problem.needed) == ("params.value_is_valid", needed)


def test_a_misspelt_section_gets_the_nearest_name(tmp_path: Path) -> None:
    (problem,) = _problems(_change(tmp_path, lambda d: d.update(back_fill={})))
    assert (problem.name, problem.do) == ("params.key_is_known", "did you mean backfill?")


def test_a_key_that_resembles_nothing_gets_the_list(tmp_path: Path) -> None:
    (problem,) = _problems(_change(tmp_path, lambda d: d["vector"].update(xyz=1)))
    assert problem.do == "valid here: column, type, dimension, distance, layout"


def test_the_alias_is_the_only_name_of_a_key(tmp_path: Path) -> None:
    (problem,) = _problems(_change(tmp_path, lambda d: d["target"].update(schema_="public")))
    assert problem.do == "did you mean schema?"


def test_a_missing_key_says_what_it_is_for(tmp_path: Path) -> None:
    path = _change(tmp_path, lambda d: d["target"].pop("key"))
    (problem,) = _problems(path)
    assert str(problem) == (
        f"FAIL    params.key_is_given   {path}: target.key\n"
        "  found   not given\n"
        "  needed  Primary key, or a NOT NULL unique column: bigint, integer, uuid or text; or several, in the order"
        " of their index.\n"
        f"  danger  {DANGER}\n"
        f"  do      {MEND}"
    )


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    (problem,) = _problems(_change(tmp_path, lambda d: d.pop("vector")))
    assert (problem.name, problem.needed) == ("params.key_is_given", "the section vector")


def test_a_wrong_type_shows_the_value(tmp_path: Path) -> None:
    path = _change(tmp_path, lambda d: d["vector"].update(dimension="8"))
    (problem,) = _problems(path)
    assert str(problem) == (
        f"FAIL    params.value_is_valid   {path}: vector.dimension\n"
        "  found   '8'\n"
        "  needed  input should be a valid integer\n"
        f"  danger  {DANGER}\n"
        "  do      Dimensions of every vector."
    )


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vector", "dimension", True),
        ("vector", "dimension", 0),
        ("vector", "distance", "cosinus"),
        ("index", "m", 1),
        ("index", "ef_construction", 2000),
        ("tune", "target_recall", 1.5),
        ("tune", "ef_search", [0]),
        ("target", "text_columns", []),
        ("target", "text_columns", "title"),
        ("target", "name", "With Capitals"),
        ("target", "table", "t" * 64),
        ("cut_over", "share_steps_percent", [50, 10, 100]),
        ("cut_over", "share_steps_percent", [10, 50]),
        ("legacy", "query", "SELECT 1"),
        ("locks", "timeout_ms", 0),
        ("embeddings", "callable", "no_colon"),
    ],
)
def test_values_out_of_range_are_refused_by_key(tmp_path: Path, section: str, key: str, value: Any) -> None:
    path = _change(tmp_path, lambda d: d.setdefault(section, {}).update({key: value}))
    problems = _problems(path)
    assert [g.name for g in problems] == ["params.value_is_valid"]
    assert problems[0].subject.startswith(f"{path}: {section}.{key}")


def test_a_dimension_that_cannot_be_indexed_names_the_way_out(tmp_path: Path) -> None:
    (problem,) = _problems(_change(tmp_path, lambda d: d["vector"].update(dimension=3072)))
    assert problem.needed == (
        "vector.dimension: 3072 cannot be indexed as vector, which allows 2000;"
        " index.storage: halfvec allows 4000, bit allows 64000"
    )
    (problem,) = _problems(_change(tmp_path, lambda d: d["vector"].update(dimension=5000, type="halfvec")))
    assert problem.needed == (
        "vector.dimension: 5000 cannot be indexed as halfvec, which allows 4000; index.storage: bit allows 64000"
    )
    (problem,) = _problems(_change(tmp_path, lambda d: d["vector"].update(dimension=16_001)))
    assert problem.needed == "input should be less than or equal to 16000"


def test_halfvec_and_bit_allow_what_vector_does_not(make_params: Callable[..., Params]) -> None:
    assert make_params(vector={"dimension": 3072, "type": "halfvec"}).indexed_type == "halfvec"
    assert make_params(vector={"dimension": 3072}, index={"storage": "halfvec"}).indexed_type == "halfvec"
    assert make_params(vector={"dimension": 16_000}, index={"storage": "bit"}).indexed_type == "bit"


@pytest.mark.parametrize(
    ("sections", "needed"),
    [
        (
            {"vector": {"dimension": 8, "type": "halfvec"}, "index": {"storage": "halfvec"}},
            "index.storage: halfvec is what the column holds already; leave index.storage out",
        ),
        (
            {"index": {"storage": "bit", "rerank": 3}},
            "storage: bit needs rerank of 4 at least: binary quantization alone ranks too coarsely",
        ),
        (
            {"index": {"storage": "bit", "rerank": 1000}, "queries": {"k": 21}},
            "index.rerank × queries.k = 21000 rows to sort again a query; an index scan ends after 20000",
        ),
    ],
)
def test_a_storage_that_does_not_fit_says_why(tmp_path: Path, sections: dict[str, Any], needed: str) -> None:
    def change(data: dict[str, Any]) -> None:
        for section, values in sections.items():
            data[section] = data.get(section, {}) | values

    (problem,) = _problems(_change(tmp_path, change))
    assert problem.needed == needed


@pytest.mark.parametrize(
    ("section", "values", "needed"),
    [
        ("connection", {"service": "x"}, "give exactly one of dsn_env and service"),
        ("index", {"m": 40}, "ef_construction 64 must be at least 2 × m = 80"),
        ("embeddings", {"source": "file"}, "source: file and callable: given do not fit"),
        (
            "cut_over",
            {"route": "hybrid"},
            "cut_over.route: hybrid needs search.fulltext_column, fulltext_expression or words_query",
        ),
        ("target", {"text_columns": ["title", "title"]}, "target.text_columns names a column twice"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(
    tmp_path: Path, section: str, values: dict[str, Any], needed: str
) -> None:
    def change(data: dict[str, Any]) -> None:
        data.setdefault(section, {}).update(values)
        if section == "cut_over":
            del data["search"]["fulltext_column"]

    assert [g.needed for g in _problems(_change(tmp_path, change))] == [needed]


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["vector"]["dimension"] = "eight"
        data["target"]["tabel"] = "articles"
        del data["legacy"]
        data["locks"]["tries"] = 0

    assert sorted(g.subject.rsplit(": ")[-1] for g in _problems(_change(tmp_path, change))) == [
        "legacy",
        "locks.tries",
        "target.tabel",
        "vector.dimension",
    ]


@pytest.mark.attack
@pytest.mark.parametrize(
    ("dsn", "needed"),
    [
        ("postgresql://u:hunter2@h/db", "a URL without credentials"),
        ("host=h password=hunter2", "takes the name of an environment variable"),
    ],
)
def test_a_dsn_in_the_file_is_refused_and_not_repeated(tmp_path: Path, dsn: str, needed: str) -> None:
    path = _change(tmp_path, lambda d: d["connection"].update(dsn_env=dsn))
    (problem,) = _problems(path)
    with pytest.raises(BadInput) as error:
        load_params(path)
    assert "hunter2" not in "".join(traceback.format_exception(error.value))
    assert needed in problem.needed
    assert "hunter2" not in str(problem)


def test_an_unknown_secret_key_is_refused_without_its_value(tmp_path: Path) -> None:
    (problem,) = _problems(_change(tmp_path, lambda d: d["connection"].update(password="hunter2")))
    assert problem.name == "params.key_is_known" and "hunter2" not in str(problem)


def test_the_record_is_plain_data_without_the_dsn(make_params: Callable[..., Params], database: str) -> None:
    record = make_params().for_record()
    assert record["target"]["schema"] == "public" and "schema_" not in record["target"]
    assert os.environ[record["connection"]["dsn_env"]] == database and database not in str(record)


def test_the_fingerprint_changes_with_what_must_not_change(make_params: Callable[..., Params]) -> None:
    first = make_params().fingerprint()
    assert make_params().fingerprint() == first
    for harmless in ({"locks": {"tries": 9}}, {"tune": {"target_recall": 0.9}}, {"embeddings": {"batch_rows": 5}}):
        assert make_params(**harmless).fingerprint() == first
    assert make_params(target={"filters": []}).fingerprint() == first, "said or not, it is the default"
    for change in ({"target": {"table": "x"}}, {"vector": {"dimension": 9}}, {"ledger": {"schema": "x"}}):
        assert make_params(**change).fingerprint() != first


def test_the_reference_describes_every_key() -> None:
    rows = {key: (kind, default, text) for key, kind, default, text in reference.rows()}
    assert all(text for _, _, text in rows.values())
    assert rows["vector.distance"][:2] == ("cosine|l2|inner_product", '"cosine"')
    assert rows["target.schema"][:2] == ("text", '"public"')
    assert rows["vector.dimension"][:2] == ("integer", "required")
    assert rows["tune.ef_search"][0] == "list of integer"
    assert rows["queries.judgements"][0] == "path"
    assert rows["masking.patterns"][0] == "name: text"
    assert rows["run.phase_timeout_minutes"][0] == "number, or phase: number"


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = _change(tmp_path, lambda _: None)
    lines = path.read_text().splitlines()
    at = lines.index("vector:") + 1
    path.write_text("\n".join([*lines[: at + 1], "  dimension: 9", *lines[at + 1 :]]))
    (problem,) = _problems(path)
    assert (problem.name, problem.found) == (
        "params.file_is_yaml",
        f"the key dimension occurs twice: lines {at + 1} and {at + 2}",
    )


@pytest.mark.parametrize(
    ("target", "needed"),
    [
        ({"key": "k"}, "the search function has an argument or a result named k; "),
        ({"key": "score"}, "the search function has an argument or a result named score; "),
        ({"filters": ["tenant", "query"]}, ":query already means something else in the statements; "),
        ({"filters": ["tenant", "tenant"]}, "a column is named twice"),
    ],
)
def test_names_that_the_function_has_already_are_refused(tmp_path: Path, target: dict[str, Any], needed: str) -> None:
    with pytest.raises(BadInput) as error:
        load_params(write_params(tmp_path, target=target))
    assert error.value.needed.startswith(needed)


def test_a_text_that_no_encoder_takes_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    path = write_params(tmp_path)
    path.write_text(path.read_text() + 'approval: {"by\\ud83d": [a, "b\\0"]}\n')
    with pytest.raises(BadInput) as error:
        load_params(path)
    assert [(g.subject.removeprefix(f"{path}: "), g.found) for g in error.value.problems] == [
        ("approval.by\\ud83d", "half of a surrogate pair, \\ud83d, at position 3: no character"),
        ("approval.by\\ud83d.1", "a NUL character at position 2, which PostgreSQL stores in no text"),
    ]


NO_VALUE = "a value that does not fit its own type, for instance a date that no calendar has"
NO_KEY = "a key is a list or a mapping; a key is one word"
TOO_MANY = "more than 10000 values, aliases counted in full"


def _eight_times_the_one_before(first: bytes, line: bytes) -> bytes:
    """Thirteen lines, each of which names the one before it eight times."""
    names = [bytes([letter]) for letter in range(ord("a"), ord("o"))]
    lines = [line % (name, name, b", ".join([b"*" + former] * 8)) for former, name in itertools.pairwise(names)]
    return first + b"".join(lines)


ODD_FILES = {
    "a list as a key": (b"[a, b]: 1", f"{NO_KEY} (line 1, column 1)"),
    "a mapping as a key": (b"? {a: b}\n: 1", f"{NO_KEY} (line 1, column 3)"),
    "brackets": (b"a: " + b"[" * 5000, "nested too deeply, or a part of itself"),
    "a part of itself": (b"a: &a [*a]", "nested too deeply, or a part of itself"),
    "aliases": (_eight_times_the_one_before(b"a: &a [x, y]\n", b"%s: &%s [%s]\n"), TOO_MANY),
    "merges": (_eight_times_the_one_before(b"a: &a {k: v}\n", b"%s: &%s {<<: [%s]}\n"), TOO_MANY),
    "a tab": (
        b"connection:\n\tdsn: postgresql://me:planted@h/d",
        "while scanning for the next token, found character '\\t' that cannot start any token (line 2, column 1)",
    ),
    "a secret on a broken line": (
        b"connection: {dsn: planted\n",
        "while parsing a flow mapping, expected ',' or '}', but got '<stream end>' (line 2, column 1)",
    ),
    "a date of no calendar": (b"a: 2026-13-45", NO_VALUE),
    "a number of 5,000 digits": (b"a: " + b"9" * 5000, NO_VALUE),
    "a tag that does not fit": (b"a: !!bool maybe", NO_VALUE),
    "another tag": (b"a: !!timestamp never", NO_VALUE),
    "a tag of Python": (b"a: !!python/name:os.system x", "could not determine a constructor for the tag"),
    "two documents": (b"a: 1\n---\nb: 2", "expected a single document in the stream, but found another document"),
}


@pytest.mark.attack
@pytest.mark.parametrize("kind", ODD_FILES)
def test_odd_yaml_is_refused_in_one_line_that_quotes_none_of_the_file(tmp_path: Path, kind: str) -> None:
    content, found = ODD_FILES[kind]
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    (problem,) = _problems(path)
    assert problem.name == "params.file_is_yaml" and problem.found.startswith(found)
    assert "\n" not in problem.found and "planted" not in str(problem)


@pytest.mark.parametrize("key", ["1", "null", "true", "2026-01-01", ".nan", "1.5", "''", "\u202eabc"])
def test_a_key_that_is_no_word_is_a_key_that_nobody_knows(tmp_path: Path, key: str) -> None:
    path = write_params(tmp_path)
    path.write_text(path.read_text() + f"{key}: 1\n")
    assert {g.name for g in _problems(path)} <= {"params.key_is_known", "params.value_is_valid"}


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write_params(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_params(path).target.name == "articles"


CREDENTIALS = [
    "https://me:planted@api.example.com/v1",
    "https://planted@api.example.com/v1",
    "https://:planted@api.example.com/v1",
    "https://me:pl@nted@api.example.com/v1",
    "https://me:pla/planted@api.example.com/v1",
    "https://api.example.com/v1?api_key=planted",
    "https://api.example.com/v1?api-version=2&Subscription-Key=planted",
    "https://api.example.com/v1?a=1;token=planted",
    "https://api.example.com/v1?api%5Fkey=planted",
    "https://api.example.com/v1?code=planted",
    "https://api.example.com/v1?pass=planted",
    "https://api.example.com/v1?x-functions-key=planted",
    "https://api.example.com/v1?SharedAccessKey=planted",
    "https://api.example.com/v1?X-Amz-Signature=planted",
    "https://api.example.com/v1;key=planted",
    "https://api.example.com/v1#access_token=planted",
    "https://api.example.com/sk-planted-0123456789/v1",
]


@pytest.mark.attack
@pytest.mark.parametrize("url", CREDENTIALS)
def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    path = _change(tmp_path, lambda d: d.update(embeddings={"source": "http", "url": url, "model": "m"}))
    (problem,) = _problems(path)
    assert problem.name == "params.url_holds_no_credentials" and problem.subject == f"{path}: embeddings.url"
    assert problem.found.startswith("a URL with ") and "planted" not in str(problem)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8080/v1/embeddings",
        "https://[::1]:8080/v1",
        "https://me.openai.azure.com/openai/deployments/x/embeddings?api-version=2024-02-01",
        "https://h:443/v1/@me/embeddings?max_tokens=5&postcode=1&key=",
        "https://h/v1?country_code=de&primary_key=id&sort-key=title&by_pass=1",
        "https://h/country/code=de/embeddings",
    ],
)
def test_a_url_without_credentials_is_taken(make_params: Callable[..., Params], url: str) -> None:
    embeddings = {"source": "http", "callable": None, "url": url, "model": "m"}
    assert make_params(embeddings=embeddings).embeddings.url == url


@pytest.mark.attack
def test_credentials_are_refused_wherever_a_url_stands_but_in_masking_patterns(tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["notify"] = {"command": ["curl", "https://me:planted@h"], "webhook_env": "https://h/planted"}
        data["legacy"]["query"] += " -- postgresql://me:planted@h/d"
        data["masking"] = {"patterns": {"login": "https?://[^:]+:[^@]+@h"}}

    path = _change(tmp_path, change)
    found = _problems(path)
    assert [g.subject for g in found] == [f"{path}: legacy.query", f"{path}: notify.command.1"]
    assert "planted" not in "".join(map(str, found))
    only_named = _change(tmp_path, lambda d: d.update(notify={"webhook_env": "https://h/planted"}))
    assert "planted" not in "".join(map(str, _problems(only_named)))


def test_prewarm_of_an_older_file_is_passed_over_where_it_asks_for_nothing_and_named_where_it_does(
    tmp_path: Path,
) -> None:
    assert load_params(_change(tmp_path, lambda d: d.setdefault("index", {}).update(prewarm=False)))
    (problem,) = _problems(_change(tmp_path, lambda d: d.setdefault("index", {}).update(prewarm=True)))
    assert (problem.subject.split(": ")[-1], problem.needed) == (
        "index",
        "prewarm was removed: delete the key, and warm the cache with pg_prewarm after 60_build_index, as"
        " docs/guide.md says",
    )


def test_a_missing_file_is_looked_for_in_the_folder_of_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "demo.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as refused:
        load_params("demo.yaml")
    assert refused.value.do == "did you mean params/demo.yaml?"
