"""Windows of keys: cut by the order of the keys alone, so that every type that has an order can be cut."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg import sql

from runbook_lib.backfill import batch_ranges
from runbook_lib.core import table_kind
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, expand_schema, extension, load_embeddings
from runbook_lib.sql.key import Key
from tests import toy
from tests.evidence import assert_every_row_has_the_vector_of_its_text

ROWS_A_WINDOW = 10

# A type, and how a value of it is made of a number. Most have no max().
TYPES = {
    "integer": "i",
    "uuid": "md5(i::text)::uuid",
    "bytea": "decode(md5(i::text), 'hex')",
    "name": "md5(i::text)::name",
    "inet": "'10.0.0.0'::inet + i",
    "macaddr": "('08:00:2b:01:02:' || lpad(to_hex(i), 2, '0'))::macaddr",
    "bit varying": "i::bit(8)::varbit",
    "character(8)": "md5(i::text)::character(8)",
    "int4range": "int4range(i, i + 1)",
    "pair": "row(i % 7, i)::pair",
    "mood": "'mood ' || i",
    "text": "'word ' || i",
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", [10, 25])
def test_keys_of_any_type_are_cut_into_ranges_that_leave_no_gap(
    articles: psycopg.Connection[Any], kind: str, rows: int
) -> None:
    moods = sql.SQL(", ").join(sql.Literal(f"mood {i}") for i in range(1, 26))
    articles.execute("CREATE TYPE pair AS (a int, b int)")
    articles.execute(sql.SQL("CREATE TYPE mood AS ENUM ({})").format(moods))
    of_type = sql.SQL("CREATE TABLE staged AS SELECT ({})::{} AS key FROM generate_series(1, {}) AS i")
    articles.execute(of_type.format(sql.SQL(TYPES[kind]), sql.SQL(kind), sql.Literal(rows)))
    articles.execute(
        "CREATE TABLE cut AS SELECT key AS after_key, key AS to_key, 'x' AS part, 0 AS id FROM staged WITH NO DATA"
    )
    articles.execute("ALTER TABLE cut DROP COLUMN id, ADD COLUMN id int GENERATED ALWAYS AS IDENTITY")
    key = Key(("key",), (sql.SQL("key"),), tuple)
    names = {"window": sql.Identifier("cut"), "staged": sql.Identifier("staged"), "key": key}
    articles.execute(batch_ranges.SQL["cut_keys"].compose(names), {"part": "articles", "rows": ROWS_A_WINDOW})
    inside = articles.execute(
        "SELECT (SELECT count(*) FROM staged s WHERE (w.after_key IS NULL OR s.key > w.after_key)"
        " AND s.key <= w.to_key) FROM cut w ORDER BY w.id"
    ).fetchall()
    whole, rest = divmod(rows, ROWS_A_WINDOW)
    assert [n for (n,) in inside] == [ROWS_A_WINDOW] * whole + ([rest] if rest else [])


def test_a_backfill_by_ranges_of_a_uuid_key_fills_every_row(
    open_phase: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_kind, "ORDINARY", replace(table_kind.ORDINARY, rows_a_key_range=30))
    articles.execute("ALTER TABLE articles ADD COLUMN u uuid NOT NULL UNIQUE DEFAULT gen_random_uuid()")
    phase = open_phase("50_backfill", target={"key": "u"}, backfill={"strategy": "key_ranges", "batch_rows": 7})
    for module in (extension, expand_schema, load_embeddings, backfill):
        module.apply(phase)
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None
    assert (recorded["strategy"], recorded["windows"], recorded["rows"]) == ("key_ranges", 7, toy.ROWS)


def test_stopped_between_its_two_tables_the_next_run_makes_the_second(
    open_phase: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = open_phase("50_backfill")
    for module in (extension, expand_schema, load_embeddings):
        module.apply(phase)
    phase.do(batch_ranges.plan(phase.connection, phase.params)[0])
    assert len(batch_ranges.plan(phase.connection, phase.params)) == 1
    backfill.apply(phase)
    assert not batch_ranges.plan(phase.connection, phase.params) and backfill.verify(phase).passed
