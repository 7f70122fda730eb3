"""Names that reach SQL: cut where PostgreSQL would cut them, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql

from runbook_lib.core import names
from runbook_lib.params import Params

# 8 bytes, and 40 letters of two bytes each.
LONG = "artikel_" + "ü" * 40


def test_a_name_that_fits_stays_whole_to_the_last_byte() -> None:
    assert names.shortened("articles", "_embedding_hnsw") == "articles_embedding_hnsw"
    stem = "a" * (63 - len("_old"))
    assert names.shortened(stem, "_old") == stem + "_old"
    assert names.shortened(stem, "_old", unlike="anything") == stem + "_old"


@pytest.mark.parametrize(
    ("tail", "letters"),
    [("_old", 25), ("_new_", 25), ("_größe", 23), ("", 27)],  # 51, 50, 47 and 55 bytes are left for them
)
def test_a_name_is_cut_before_its_tail_and_never_within_a_letter(tail: str, letters: int) -> None:
    assert names.shortened(LONG, tail) == "artikel_" + "ü" * letters + tail


@pytest.mark.parametrize("stem", [LONG, "x" + LONG, "名" * 30, "😀" * 20, "plain"])
def test_it_is_cut_as_postgresql_cuts_a_name(server: str, stem: str) -> None:
    with psycopg.connect(server) as connection:
        row = connection.execute("SELECT %s::text::name::text", (stem,)).fetchone()
    assert row == (names.shortened(stem, ""),)


def test_names_whose_stems_begin_alike_keep_apart_where_they_must_be_cut() -> None:
    # SHA-256 of "abc" begins ba7816bf: FIPS 180-4, appendix B.1. 63 - 6 - 9 = 48 bytes are left.
    assert names.shortened(LONG, "_parts", unlike="abc") == "artikel_" + "ü" * 20 + "_ba7816bf_parts"
    one, other = (names.shortened(LONG + end, "_parts", unlike=LONG + end) for end in "ab")
    assert one != other and len(one) == len(other)
    assert names.shortened(LONG + "a", "_parts") == names.shortened(LONG + "b", "_parts")


def test_the_index_and_the_side_table_of_a_long_table_name(make_params: Callable[..., Params]) -> None:
    target: dict[str, Any] = {"table": "artikel_" + "ü" * 27}
    p = make_params(target=target)
    assert names.index_name(p) == "artikel_" + "ü" * 20 + "_embedding_hnsw"
    assert names.side_table_name(p) == "artikel_" + "ü" * 22 + "_embedding"


def test_sql_that_is_written_already_reaches_the_server_as_it_is(server: str) -> None:
    written = names.verbatim("""'{} {0} 100 % %s %%' AS "of 50%", 7 % 4""")
    with psycopg.connect(server) as connection:
        found = connection.execute(sql.SQL("SELECT {}, %(bound)s::int").format(written), {"bound": 5})
        assert found.fetchone() == ("{} {0} 100 % %s %%", 3, 5)
        assert found.description is not None and found.description[0].name == "of 50%"
