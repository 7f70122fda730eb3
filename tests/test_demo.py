"""The demo data: what is in it, what is kept out of it, and that it can be made again."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from runbook_lib.benchmark import loop, query_set
from runbook_lib.benchmark.query_set import Query
from runbook_lib.cli import demo
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput
from runbook_lib.core.target import load_params
from runbook_lib.params import Params
from runbook_lib.search import statements

DEMO_YAML = Path(__file__).parent.parent / "params" / "demo.yaml"


def rows(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(query).fetchall()  # type: ignore[arg-type]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


Loaded = tuple[str, Path, demo.DemoData]


@pytest.fixture(scope="module")
def loaded(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """One load for the tests that only read: DSN, folder, what load() returned."""
    folder = tmp_path_factory.mktemp("demo")
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("CREATE DATABASE demo_for_reading")
        dsn = make_conninfo(server, dbname="demo_for_reading")
        yield dsn, folder, demo.load(dsn, folder)
        admin.execute("DROP DATABASE demo_for_reading WITH (FORCE)")


@pytest.fixture
def demo_params(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Params]:
    monkeypatch.setenv("RUNBOOK_DEMO_DSN", database)
    return load_params(DEMO_YAML)


def test_the_counts_are_those_of_the_catalogue(loaded: Loaded) -> None:
    dsn, folder, data = loaded
    assert data == demo.DemoData(articles=938, passages=0, queries=1959, judgements=2690)
    assert rows(dsn, "SELECT count(*), count(DISTINCT id) FROM demo.articles") == [(938, 938)]
    assert (len(lines(folder / "queries.jsonl")), len(lines(folder / "judgements.jsonl"))) == (1959, 2690)


def test_an_article_is_plain_text_with_its_paragraphs(loaded: Loaded) -> None:
    query = "SELECT title, body, status, category, created_at::date::text, views FROM demo.articles WHERE id = 79"
    ((title, body, *rest),) = rows(loaded[0], query)
    assert title == "Improper Neutralization of Input During Web Page Generation ('Cross-site Scripting')"
    paragraphs = body.split("\n")
    assert paragraphs[0].startswith("The product does not neutralize or incorrectly neutralizes")
    assert paragraphs[1:3] == [
        "Cross-site scripting (XSS) vulnerabilities occur when:",
        "Untrusted data enters a web application, typically from a web request.",
    ]
    assert rest == ["Stable", "Base", "2006-07-19", 0]


def test_no_markup_and_no_stray_space_is_left(loaded: Loaded) -> None:
    stray = r"SELECT id FROM demo.articles WHERE body ~ '(xhtml:|^\s|\s$|  |\n\n|\t)' OR body = '' OR title = ''"
    assert rows(loaded[0], stray) == []


def test_every_judgement_is_the_catalogues_own_and_nothing_is_lost(loaded: Loaded) -> None:
    """Read a second time, by plain regular expressions on the file."""
    dsn, folder, _ = loaded
    catalogue = files("cwe2").joinpath("database_v49/cwec_v4.14.xml").read_text("utf-8")
    texts = {q["query_id"]: q["text"] for q in lines(folder / "queries.jsonl")}
    judged = {(texts[j["query_id"]], j["key"]) for j in lines(folder / "judgements.jsonl")}
    expected = set()
    weaknesses = r'<Weakness ID="(\d+)"[^>]* Status="(\w+)">(.*?)</Weakness>'
    examples = r"<Observed_Example>.*?<Description>(.*?)</Description>"
    for key, status, weakness in re.findall(weaknesses, catalogue, re.DOTALL):
        for example in re.findall(examples, weakness, re.DOTALL):
            text = demo._without_identifiers(demo._text(ET.fromstring(f"<d>{example}</d>")))
            if status != "Deprecated" and len(re.findall(r"\w+", text)) >= 5:
                expected.add((text, key))
    assert judged == expected
    assert {int(key) for _, key in judged} <= {row[0] for row in rows(dsn, "SELECT id FROM demo.articles")}


def test_queries_give_no_answer_away(loaded: Loaded) -> None:
    texts = [q["text"] for q in lines(loaded[1] / "queries.jsonl")]
    assert [t for t in texts if re.search(r"C(WE|VE)-\d", t, re.IGNORECASE)] == []
    assert len(set(texts)) == len(texts)
    bodies = "\n".join(row[0] for row in rows(loaded[0], "SELECT body FROM demo.articles"))
    assert [t for t in texts if t in bodies] == []


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Chain: integer overflow (CWE-190) causes overread (CWE-126).", "Chain: integer overflow causes overread."),
        ("path traversal [CWE-22, CWE-23] as in CVE-2019-1234", "path traversal as in"),
        ("CWE-79 in a CWE-79-like form", "in a like form"),
        ("no number (at all), and the CWE list", "no number (at all), and the CWE list"),
    ],
)
def test_numbers_go_and_take_their_brackets_with_them(text: str, left: str) -> None:
    assert demo._without_identifiers(text) == left


def test_a_second_load_starts_from_nothing(database: str, tmp_path: Path) -> None:
    dsn, folder, first = database, tmp_path, demo.load(database, tmp_path)
    files_before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with psycopg.connect(dsn) as connection:
        connection.execute("ALTER TABLE demo.articles ADD COLUMN embedding real[]")
        connection.execute("DELETE FROM demo.articles WHERE id < 500")
        connection.execute("CREATE FUNCTION demo.search_articles() RETURNS int LANGUAGE sql RETURN 1")
    assert demo.load(dsn, folder) == first
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files_before
    columns = rows(dsn, "SELECT attname FROM pg_attribute WHERE attrelid = 'demo.articles'::regclass AND attnum > 0")
    assert [c for (c,) in columns] == ["id", "title", "body", "status", "category", "created_at", "views", "tsv"]
    assert rows(dsn, "SELECT to_regproc('demo.search_articles')") == [(None,)]


def test_a_schema_of_somebody_else_is_left_alone(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database) as connection:
        connection.execute(
            "CREATE SCHEMA demo; CREATE TABLE demo.articles (id int); COMMENT ON SCHEMA demo IS 'mine'"
        )
    with pytest.raises(BadInput) as error:
        demo.load(database, tmp_path)
    name = conninfo_to_dict(database)["dbname"]
    assert str(error.value) == (
        f"\nFAIL    demo.schema_is_ours   schema demo in database {name}\n"
        "  found   a schema demo that the runbook did not make\n"
        "  needed  no schema demo, or the one that `runbook demo` made\n"
        "  danger  loading the demo drops the schema with all that is in it; nothing was changed\n"
        "  do      load the demo into a database of its own"
    )
    assert rows(database, "SELECT count(*) FROM demo.articles") == [(0,)]
    assert list(tmp_path.iterdir()) == []


def test_a_grown_table_holds_real_passages_and_leaves_the_judged_rows_as_they_are(
    loaded: Loaded, database: str, tmp_path: Path
) -> None:
    dsn, folder, small = loaded
    digest = "SELECT md5(string_agg(a::text, '' ORDER BY id)) FROM demo.articles a WHERE id < 1000000"
    before, judgements = rows(dsn, digest), (folder / "judgements.jsonl").read_bytes()
    dsn, folder = database, tmp_path
    grown = demo.load(dsn, folder, grow_to_rows=3000)
    assert (grown.rows, grown.articles, grown.queries) == (3000, small.articles, small.queries)
    assert (rows(dsn, digest), (folder / "judgements.jsonl").read_bytes()) == (before, judgements)
    passages = rows(
        dsn,
        "SELECT min(id), max(id), count(*), count(DISTINCT body), min(status), max(status), max(length(body)) <= 1200"
        " FROM demo.articles WHERE id > 1000000",
    )
    assert passages == [(1_000_001, 1_002_062, 2062, 2062, "Passage", "Passage", True)]
    queries = {q["text"] for q in lines(folder / "queries.jsonl")}
    assert not queries & {row[0] for row in rows(dsn, "SELECT body FROM demo.articles")}
    catalogue = re.sub(r"\W+", "", "".join(ET.fromstring(
        files("cwe2").joinpath("database_v49/cwec_v4.14.xml").read_bytes()).itertext()))  # fmt: skip
    bodies = [row[0] for row in rows(dsn, "SELECT body FROM demo.articles WHERE id > 1000000 ORDER BY id LIMIT 200")]
    assert [b for b in bodies if re.sub(r"\W+", "", b) not in catalogue] == []


def test_growing_goes_on_with_docstrings_after_the_catalogue() -> None:
    passages = demo._python_passages()
    found = [next(passages) for _ in range(200)]
    assert {section for _, _, section, _ in found} == {"Python standard library"}
    assert any(title.startswith("__future__") and "future" in body for title, body, _, _ in found)


def test_growing_beyond_the_real_text_is_refused_before_anything_changes(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_python_passages", lambda: iter(()))
    with pytest.raises(BadInput) as error:
        demo.load(database, tmp_path, grow_to_rows=1_000_000)
    there = re.match(r"\d+", error.value.found)
    assert there is not None and 4000 < int(there[0]) < 10_000
    assert (error.value.needed, error.value.do) == ("1000000 rows", f"ask for at most {there[0]} rows")
    assert rows(database, "SELECT to_regnamespace('demo')") == [(None,)]


def test_a_long_paragraph_is_cut_at_words_and_nothing_is_lost() -> None:
    text = "\n\n".join([" ".join(f"word{i}" for i in range(400)), "Short one.", "x" * 3000, "Another\nline of it."])
    windows = list(demo._windows(text))
    assert max(map(len, windows)) <= demo.LONGEST_PASSAGE_CHARACTERS
    assert re.sub(r"\s", "", "".join(windows)) == re.sub(r"\s", "", text)


def test_the_table_has_what_a_legacy_search_has_and_keeps_mitres_notice(
    loaded: Loaded,
) -> None:
    dsn, _, _ = loaded
    indexes = "SELECT regexp_replace(indexdef, '^.* USING ', '') FROM pg_indexes WHERE schemaname = 'demo' ORDER BY 1"
    assert [r[0] for r in rows(dsn, indexes)] == [
        "btree (category)",
        "btree (id)",
        "btree (status)",
        "gin (body gin_trgm_ops)",
        "gin (title gin_trgm_ops)",
        "gin (tsv)",
    ]
    assert rows(dsn, "SELECT extname FROM pg_extension WHERE extname ~ '^pg_' ORDER BY 1") == [
        ("pg_stat_statements",),
        ("pg_trgm",),
    ]
    ((notice,),) = rows(dsn, "SELECT obj_description('demo.articles'::regclass)")
    assert notice == files("cwe2").joinpath("database_v49/cwe.NOTICE").read_text("utf-8").strip()
    assert "The MITRE Corporation" in notice
    assert rows(dsn, "SELECT reltuples FROM pg_class WHERE oid = 'demo.articles'::regclass") == [(938.0,)]


def test_the_params_file_is_valid_and_its_judged_keys_are_in_the_table(
    loaded: Loaded, demo_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNBOOK_DEMO_DSN", loaded[0])
    root = DEMO_YAML.parent.parent
    assert (demo_params.queries.file.resolve(), demo_params.record.runs_dir.resolve()) == (
        root / "runs/demo/queries.jsonl",
        root / "runs",
    )
    queries = demo_params.queries.model_copy(
        update={"file": loaded[1] / "queries.jsonl", "judgements": loaded[1] / "judgements.jsonl"}
    )
    p = demo_params.model_copy(update={"queries": queries})
    with db.connect(p, "test") as connection:
        assert query_set.unknown_keys(connection, p) == []


def ask(p: Params, text: str, k: int = 10, **filters: str) -> list[str]:
    with db.connect(p, "test") as connection:
        values = {"query": text, "k": k, **dict.fromkeys(p.target.filters), **filters}
        found = connection.execute(statements.legacy_statement(connection, p), values).fetchall()
        answers = loop.ask(connection, p, statements.legacy_statement(connection, p), [Query("q", text)], k)
    if not filters:
        assert [str(row["id"]) for row in found] == answers.keys["q"]
    return [str(row["id"]) for row in found]


@pytest.fixture
def small(database: str, demo_params: Params) -> Params:
    """Five rows that can be ranked by hand."""
    with psycopg.connect(database) as connection:
        connection.execute(
            """
            CREATE SCHEMA demo;
            CREATE TABLE demo.articles (id bigint PRIMARY KEY, title text, body text, status text, category text);
            INSERT INTO demo.articles VALUES
                (1, 'Cookie leak',  'nothing else',            'Draft',  'Base'),
                (2, 'Other',        'a COOKIE does leak here', 'Stable', 'Base'),
                (3, 'Leak',         'of a cookie, a leak',     'Stable', 'Class'),
                (4, 'Percent',      '100% of a_b',             'Stable', 'Base'),
                (5, 'Underscore',   'axb',                     'Stable', 'Base');
            """
        )
    return demo_params


def test_the_legacy_query_counts_terms_and_those_in_the_title_double(small: Params) -> None:
    assert ask(small, "cookie leak") == ["1", "3", "2"]  # 4; 2 + 1 + 1 = 4, after 1 by key; 2


def test_the_legacy_query_counts_a_repeated_term_once(small: Params) -> None:
    assert ask(small, "other Cookie OTHER") == ["2", "1", "3"]  # 2 + 1; 2; 1


def test_the_legacy_query_takes_like_metacharacters_as_they_are(small: Params) -> None:
    assert ask(small, "a_b") == ["4"]
    assert ask(small, "%") == []
    assert ask(small, "") == []


def test_the_legacy_query_filters_and_limits(small: Params) -> None:
    assert ask(small, "cookie", status="Stable") == ["2", "3"]
    assert ask(small, "cookie", status="Stable", category="Class") == ["3"]
    assert ask(small, "cookie", k=1) == ["1"]
