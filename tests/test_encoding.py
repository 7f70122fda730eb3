"""Databases in another encoding than UTF-8: what they hold is embedded and hashed as it is, and the rest is said."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.backfill import change_queue
from runbook_lib.core import approval, db
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gate
from runbook_lib.embeddings.sources import hash_of
from runbook_lib.migrate import backfill, encoding, expand_schema, extension, load_embeddings
from runbook_lib.params import Params
from runbook_lib.runner import sign_off
from runbook_lib.search import search_function
from tests import toy
from tests.conftest import DSN_ENV
from tests.opened import opened

Connection = psycopg.Connection[Any]


@pytest.fixture
def in_encoding(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Connection]]:
    """Makes a database in an encoding, with the toy table in it, where the parameters find it."""
    made: list[Connection] = []

    def make(name: str) -> Connection:
        database = sql.Identifier(f"in_{name.lower()}")
        options = "TEMPLATE template0 ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C'"
        admin.execute(sql.SQL("CREATE DATABASE {} " + options).format(database, sql.Literal(name)))
        dsn = make_conninfo(server, dbname=f"in_{name.lower()}", client_encoding="UTF8")
        monkeypatch.setenv(DSN_ENV, dsn)
        connection = psycopg.connect(dsn, autocommit=True)
        made.append(connection)
        toy.create_articles(connection)
        return connection

    with psycopg.connect(server, autocommit=True) as admin:
        yield make
        for connection in made:
            name = sql.Identifier(connection.info.dbname)
            connection.close()
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def looked_at(p: Params) -> list[Gate]:
    with db.connect(p, "look") as connection:
        return list(encoding.check(connection, p))


@pytest.mark.parametrize(
    ("name", "text"), [("LATIN1", "Größe, Maß"), ("EUC_JP", "索引と検索"), ("WIN1251", "Ёлка №1")]
)
def test_texts_are_embedded_hashed_and_refreshed_as_the_characters_they_are(
    in_encoding: Callable[[str], Connection], make_params: Callable[..., Params], tmp_path: Path, name: str, text: str
) -> None:
    articles = in_encoding(name)
    articles.execute("UPDATE articles SET title = %s WHERE id = 3", [text])
    # Vectors made elsewhere, of texts in UTF-8: each is taken only where its text has the hash of the row's.
    rows = articles.execute("SELECT id, title || E'\n' || body FROM articles WHERE title IS NOT NULL").fetchall()
    lines = [{"id": key, "text": t, "embedding": toy.embed([t])[0].tolist()} for key, t in rows]
    (tmp_path / "vectors.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"source": "file", "callable": None, "file": "vectors.jsonl"}
    loading = opened(make_params(embeddings=given))
    for module in (search_function, extension, expand_schema, load_embeddings, backfill):
        module.apply(loading)
    for module in (expand_schema, backfill):
        assert [g.found for g in module.verify(loading).failed] == ["no catalogue from the start to compare with"][
            : module is expand_schema
        ]
    articles.execute("UPDATE articles SET body = %s WHERE id = 4", [text])
    refreshing = opened(make_params())
    assert change_queue.drain(refreshing).updated == 1
    hashes = "SELECT title || E'\n' || body, embedding_hash FROM articles WHERE id IN (3, 4)"
    assert all(hash_of(t) == digest for t, digest in articles.execute(hashes).fetchall())
    for phase in (loading, refreshing):
        phase.end("was ended by the test", "nothing")


def test_the_ledger_keeps_what_the_encoding_has_and_writes_the_rest_in_ascii(
    in_encoding: Callable[[str], Connection], make_params: Callable[..., Params]
) -> None:
    in_encoding("LATIN1")
    phase = opened(make_params())
    phase.ledger.append("note", {"found": "Größe … 索引", "nul": "\x00"})
    assert phase.ledger.latest("note") == {"found": r"Größe \u2026 \u7d22\u5f15", "nul": r"\u2400"}
    phase.end("was ended by the test", "nothing")


def test_a_sign_off_may_give_its_reason_in_characters_that_the_encoding_lacks(
    in_encoding: Callable[[str], Connection], make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    articles = in_encoding("LATIN1")
    phase = opened(make_params())
    asked = approval.Asked((), "parameters", 1, "evidence", (("索引.jsonl", "hash of the file"),))
    phase.ledger.append("request", {**asked.as_data(), "plan": []})
    (request,) = articles.execute("SELECT max(seq) FROM runbook.entry").fetchone() or (0,)
    pending = sign_off.Pending("50_backfill", request, "", "", "", (), asked, Table((), []), Table((), []))
    articles.execute("CREATE ROLE signer SUPERUSER LOGIN")
    monkeypatch.setenv(DSN_ENV, make_conninfo(articles.info.dsn, user="signer"))
    try:
        with db.connect(phase.params, "approve") as signer:
            sign_off.approve(signer, phase.params, pending, "geprüft → gut")
        assert (phase.ledger.latest("approval") or {})["reason"] == r"geprüft \u2192 gut"
    finally:
        articles.execute("DROP ROLE signer")
        phase.end("was ended by the test", "nothing")


def test_queries_that_the_encoding_cannot_ask_are_named(
    in_encoding: Callable[[str], Connection], make_params: Callable[..., Params], tmp_path: Path
) -> None:
    in_encoding("LATIN1")
    p = make_params()
    known, asked = looked_at(p)
    assert (known.verdict, known.found) == ("PASS", "LATIN1, converted to UTF-8 for the model and for hashes")
    assert (asked.verdict, asked.found) == ("PASS", "LATIN1 has every character of the queries")
    with p.queries.file.open("a", encoding="utf-8") as file:
        file.write('{"query_id": "ja", "text": "索引"}\n{"query_id": "de", "text": "Größe"}\n')
    _, asked = looked_at(p)
    assert (asked.verdict, asked.found) == ("FAIL", "LATIN1 has no 引 索, asked for by ja")


def test_a_database_that_does_not_know_its_characters_is_refused(
    in_encoding: Callable[[str], Connection], make_params: Callable[..., Params]
) -> None:
    in_encoding("SQL_ASCII")
    (found,) = looked_at(make_params())
    assert str(found) == (
        "FAIL    encoding.characters_are_known   database in_sql_ascii\n"
        "  found   SQL_ASCII: PostgreSQL takes any bytes, and does not know which characters they are\n"
        "  needed  a database with an encoding; UTF8 has every character\n"
        "  danger  one text in Latin-1 among those in UTF-8 stops loading, backfill and refresh, whenever it is"
        " written\n"
        "  do      make a database in UTF8 and restore into it what pg_dump --encoding wrote, naming the encoding"
        " that the texts have; what is in no encoding must be fixed first"
    )
