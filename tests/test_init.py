"""`runbook init`: what it finds in a table that it has not seen, what it writes, and what it says where it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from runbook_lib.cli import init as init_command
from runbook_lib.cli.main import main
from runbook_lib.core.gates import BadInput
from runbook_lib.core.target import load_params
from runbook_lib.migrate import inputs
from runbook_lib.params import Params
from tests.conftest import DSN_ENV

Runbook = Callable[..., Result]


@pytest.fixture
def init(tmp_path: Path, database: str) -> Callable[..., tuple[Result, Path]]:
    """Calls ``runbook init`` on a table; gives the result and the path of the file it was to write."""
    path = tmp_path / "params" / "mine.yaml"

    def call(*args: object) -> tuple[Result, Path]:
        given = ["init", "--dsn-env", DSN_ENV, "--output", path, *args]
        return CliRunner().invoke(main, [str(a) for a in given]), path

    return call


@pytest.fixture
def table(database: str) -> Callable[[str], psycopg.Connection[Any]]:
    def make(ddl: str) -> psycopg.Connection[Any]:
        connection = psycopg.connect(database, autocommit=True)
        connection.execute(ddl)
        return connection

    return make


PRODUCTS = """
    CREATE EXTENSION pg_stat_statements;
    CREATE TABLE products (
        sku uuid PRIMARY KEY DEFAULT gen_random_uuid(), made_at timestamptz DEFAULT now(), website text,
        details text NOT NULL, name text NOT NULL, colour text, in_stock boolean,
        words tsvector GENERATED ALWAYS AS (to_tsvector('simple', name)) STORED
    );
    INSERT INTO products (website, details, name, colour, in_stock)
    SELECT 'https://example.org/' || i, 'a lamp of type ' || i || ' for desk and shelf', 'lamp ' || i,
           (ARRAY['red', 'green', 'blue'])[1 + i % 3], i % 2 = 0 FROM generate_series(1, 500) i;
    ANALYZE products;
"""


def search(connection: psycopg.Connection[Any]) -> None:
    """Searches as an application does. Of a server that the whole session of tests shares every entry is taken, and
    what was called three times is the first to be thrown out, so this begins with an empty count."""
    connection.execute("SELECT pg_stat_statements_reset()")
    query = (
        "SELECT sku, name FROM products WHERE (name ILIKE %s OR details ILIKE %s) AND colour = %s"
        " ORDER BY name LIMIT %s"
    )
    for word in ("lamp", "desk", "shelf"):
        connection.execute(query, [f"%{word}%", f"%{word}%", "red", 10])


def problems(p: Params) -> list[str]:
    return [g.name for g in inputs.input_problems(p).failed]


def test_a_table_it_has_not_seen_gets_a_file_that_passes_every_check(
    init: Callable[..., tuple[Result, Path]], table: Callable[[str], psycopg.Connection[Any]]
) -> None:
    connection = table(PRODUCTS)
    connection.execute("CREATE SCHEMA vectors; CREATE EXTENSION vector SCHEMA vectors")
    search(connection)
    result, path = init("--table", "products")
    assert (result.exit_code, result.stdout) == (0, f"{path}\n"), result.stderr
    p = load_params(path)
    assert p.extension.schema_ == "vectors"
    assert (p.target.key, p.target.text_columns, list(p.target.filters)) == ("sku", ["name", "details"], ["colour"])
    assert (p.search.fulltext_column, p.search.fulltext_config) == ("words", "simple")
    assert "(:colour::text IS NULL OR colour = :colour)" in p.legacy.query
    assert problems(p) == []
    text = path.read_text()
    assert "few values also share: in_stock" in text
    assert "the application puts % around the user's text for LIKE" in text
    queries = [json.loads(line) for line in p.queries.file.read_text().splitlines()]
    assert queries[0]["query_id"] == "starter-1" and len(queries) == 50
    assert "A STARTER cut from the table's own titles" in text


WORDS = """
    CREATE SCHEMA app;
    CREATE TEXT SEARCH CONFIGURATION app."My German" (COPY = german);
    CREATE FUNCTION app.joined(text, text) RETURNS text IMMUTABLE LANGUAGE sql AS $$SELECT $1 || ' ' || $2$$;
    SET search_path = public, app;
    CREATE TABLE notes (id int PRIMARY KEY, title varchar(80) NOT NULL, "Long text" text NOT NULL, kept boolean);
    INSERT INTO notes SELECT i, 'note ' || i, 'the long text of note ' || i, true FROM generate_series(1, 40) i;
    CREATE INDEX partly ON notes USING gin (to_tsvector('english', joined(title, "Long text"))) WHERE kept;
    CREATE INDEX titles ON notes USING gin (to_tsvector('english', title));
    CREATE INDEX words ON notes USING gist (to_tsvector('app."My German"', joined(title, "Long text")));
    RESET search_path;
"""


def test_an_index_on_an_expression_of_words_is_found_where_no_column_holds_them(
    init: Callable[..., tuple[Result, Path]], table: Callable[[str], psycopg.Connection[Any]]
) -> None:
    connection = table(WORDS)
    result, path = init("--table", "notes")
    assert result.exit_code == 0, result.stderr
    p = load_params(path)
    assert p.search.fulltext_column is None
    assert p.search.fulltext_expression == (
        'to_tsvector(\'app."My German"\'::regconfig, app.joined((title)::text, "Long text"))'
    )
    assert p.search.fulltext_config == 'app."My German"'
    assert "as the index words has it; others on words: titles" in path.read_text()
    served = [g for g in inputs.input_problems(p) if g.name.startswith("inputs.fulltext")]
    assert [(g.found, str(g.verdict)) for g in served] == [
        ("tsvector", "PASS"),
        ("there", "PASS"),
        ("words serves it", "PASS"),
    ]
    connection.execute("DROP INDEX words, titles")
    init("--table", "notes", "--force")
    assert not load_params(path).search.has_fulltext, "a partial index serves no search of every row"


COMMA = "Long text, 100 %"


def test_names_that_need_quotes_are_found_and_written(
    init: Callable[..., tuple[Result, Path]], table: Callable[[str], psycopg.Connection[Any]]
) -> None:
    table(
        """
        CREATE SCHEMA "My Shop";
        CREATE TABLE "My Shop"."Things: all" ("No." integer PRIMARY KEY, "Long text, 100 %" text, "Title" text);
        INSERT INTO "My Shop"."Things: all" SELECT i, 'the long text of ' || i, 'title ' || i
        FROM generate_series(1, 40) i;
        """
    )
    result, path = init("--schema", "My Shop", "--table", "Things: all")
    assert result.exit_code == 0, result.stderr
    p = load_params(path)
    assert (p.target.name, p.target.key, p.target.text_columns) == ("things_all", "No.", ["Title", COMMA])
    assert problems(p) == []
    assert "A PLACEHOLDER, not the search of today" in path.read_text()
    assert "a placeholder is written in its place" in result.stderr
    mine = path.with_name("mine.sql")
    mine.write_text(f"""SELECT "No." FROM "My Shop"."Things: all" WHERE "{COMMA}" LIKE '%' || :query LIMIT :k""")
    for flags in (["--legacy-query-file", mine], ["--text-columns", f'"{COMMA}"']):
        result, path = init("--schema", "My Shop", "--table", "Things: all", "--force", *flags)
        assert (result.exit_code, load_params(path).target.text_columns) == (0, [COMMA]), result.stderr


def test_what_was_given_is_not_second_guessed(
    init: Callable[..., tuple[Result, Path]], table: Callable[[str], psycopg.Connection[Any]], tmp_path: Path
) -> None:
    table(PRODUCTS)
    mine = tmp_path / "mine.sql"
    mine.write_text(
        "SELECT sku FROM products\nWHERE details ILIKE '%' || :query || '%' AND :colour IS NULL\nLIMIT :k;\n"
    )
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query_id": "1", "text": "lamp"}\n')
    flags = ["--text-columns", "details", "--legacy-query-file", mine, "--queries-file", queries]
    result, path = init("--table", "products", *flags, "--model", "my.models:embed", "--dimension", 3072)
    assert result.exit_code == 0, result.stderr
    p = load_params(path)
    assert list(p.target.filters) == ["colour"], "the filter that the given query names"
    assert (p.vector.type, p.embeddings.callable) == ("halfvec", "my.models:embed")
    assert p.queries.file.resolve() == queries and p.legacy.query + ";\n" == mine.read_text()
    assert "pgvector indexes vector only up to 2000" in path.read_text()


def test_a_file_that_is_there_is_not_overwritten_without_force(
    init: Callable[..., tuple[Result, Path]], table: Callable[[str], psycopg.Connection[Any]]
) -> None:
    table(PRODUCTS)
    _, path = init("--table", "products")
    path.write_text("mine")
    result, _ = init("--table", "products")
    assert (result.exit_code, path.read_text()) == (2, "mine")
    assert "init.file_is_free" in result.stderr and "say --force" in result.stderr
    assert init("--table", "products", "--force")[0].exit_code == 0
    assert path.read_text() != "mine"


@pytest.mark.parametrize(
    ("ddl", "name", "do"),
    [
        (
            "CREATE TABLE notes (body text)",
            "init.key_is_found",
            "ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY UNIQUE;",
        ),
        (
            "CREATE TABLE notes (tenant_id int, id int, body text, UNIQUE (tenant_id, id))",
            "init.key_is_found",
            "ADD COLUMN row_id bigint GENERATED ALWAYS AS IDENTITY UNIQUE;",
        ),
        (
            "CREATE TABLE notes (id int PRIMARY KEY, n int)",
            "init.text_is_found",
            "the table has: id integer, n integer",
        ),
        ("CREATE TABLE note (id int PRIMARY KEY)", "inputs.table_exists", 'did you mean "public"."note"?'),
        ("CREATE VIEW notes AS SELECT 1 AS id", "inputs.table_exists", "name the table behind it"),
    ],
)
def test_a_table_that_cannot_be_migrated_is_refused_with_the_way_out(
    init: Callable[..., tuple[Result, Path]],
    table: Callable[[str], psycopg.Connection[Any]],
    ddl: str,
    name: str,
    do: str,
) -> None:
    table(ddl)
    result, path = init("--table", "notes")
    assert (result.exit_code, result.stdout, path.parent.exists()) == (2, "", False)
    assert name in result.stderr and do in result.stderr, result.stderr


def test_without_a_table_it_names_those_that_hold_text(
    init: Callable[..., tuple[Result, Path]], table: Callable[[str], psycopg.Connection[Any]]
) -> None:
    table(PRODUCTS)
    result, _ = init()
    assert (result.exit_code, "say --table" in result.stderr) == (2, True)


@pytest.mark.attack
def test_a_dsn_in_place_of_its_name_is_refused_and_not_repeated(tmp_path: Path) -> None:
    given = ["init", "--dsn-env", "postgresql://me:hunter2@example.org/db", "--table", "t"]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 2 and "hunter2" not in result.stderr


def test_a_graph_too_large_for_the_server_makes_way_for_ivfflat(
    init: Callable[..., tuple[Result, Path]], table: Callable[[str], psycopg.Connection[Any]], database: str
) -> None:
    connection = table(PRODUCTS)
    name = connection.info.dbname
    connection.execute(
        psycopg.sql.SQL("ALTER DATABASE {} SET effective_cache_size = '64kB'").format(psycopg.sql.Identifier(name))
    )
    result, path = init("--table", "products")
    assert result.exit_code == 0, result.stderr
    assert load_params(path).index.method == "ivfflat"
    assert "an HNSW graph would take" in path.read_text()


def test_at_a_terminal_a_wrong_answer_is_asked_for_again(
    tmp_path: Path, database: str, table: Callable[[str], psycopg.Connection[Any]]
) -> None:
    table(PRODUCTS)
    given = {
        "environment variable": ["NO_SUCH", DSN_ENV],
        "table": ["prodcuts", "products"],
        "key": ["name", "sku"],
        "text columns": ["nmae, details", "name, details"],
        "filters": ["hue", "colour"],
        "model": ["wordllama"],
        "is this": ["no"] * 9,
    }
    said: list[str] = []

    def ask(question: str, _suggestion: str) -> str:
        return next(answers for start, answers in given.items() if question.startswith(start)).pop(0)

    wishes = init_command.Wishes()
    path = init_command.write(wishes, tmp_path / "x.yaml", force=False, ask=ask, say=said.append, interactive=True)
    p = load_params(path)
    assert (p.target.table, p.target.key, list(p.target.filters)) == ("products", "sku", ["colour"])
    assert len([line for line in said if "FAIL" in line]) == 5
    assert [line for line in said if "did you mean name? Else say --text-columns; the table has: " in line]
    with pytest.raises(BadInput):
        init_command.write(wishes, tmp_path / "y.yaml", force=False, ask=lambda *_: "nothing", say=said.append)
