"""What a partitioned target must be: whole gate messages, and what is let through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.core.gates import Gate
from runbook_lib.migrate import inputs
from runbook_lib.params import Params
from tests import partitioned

MakeParams = Callable[..., Params]
KEY = "inputs.key_identifies_rows"


@pytest.fixture
def parted(articles: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """The toy table, partitioned by a list of tenants, in the place of the ordinary one."""
    articles.execute("DROP TABLE articles")
    partitioned.create_articles(articles, "list")
    return articles


def _gates(params: Params) -> dict[str, Gate]:
    return {g.name: g for g in inputs.input_problems(params)}


def test_a_partitioned_table_is_let_through(parted: psycopg.Connection[Any], make_params: MakeParams) -> None:
    gates = _gates(make_params())
    assert [g for g in gates.values() if g.verdict != "PASS"] == []
    assert gates["inputs.partitions_are_tables"].found == "4 partitions, each a table of this server"
    assert gates[KEY].found == (
        "no valid unique index on this column alone, drawn from nextval('articles_id_seq'::regclass), first in"
        " articles_pkey, no value occurs twice, NOT NULL"
    )


def test_a_key_that_stands_twice_is_refused(parted: psycopg.Connection[Any], make_params: MakeParams) -> None:
    parted.execute("INSERT INTO articles (id, tenant) VALUES (7, 'another')")
    assert str(_gates(make_params())[KEY]) == (
        'FAIL    inputs.key_identifies_rows   id of "public"."articles"\n'
        "  found   no valid unique index on this column alone, drawn from nextval('articles_id_seq'::regclass), first"
        " in articles_pkey, 7 occurs twice, NOT NULL\n"
        "  needed  NOT NULL, with its own unique index; or drawn from one source, occurring once, and first in"
        " an index\n"
        "  danger  a row would get no vector, or every batch would read the whole table\n"
        '  do      give the rows that share a value of "id" values of their own;'
    )


def test_a_key_from_nowhere_is_refused_until_somebody_answers_for_it(
    parted: psycopg.Connection[Any], make_params: MakeParams
) -> None:
    parted.execute("ALTER TABLE articles ALTER COLUMN id DROP DEFAULT")
    refused = _gates(make_params())[KEY]
    assert refused.verdict == "FAIL"
    assert refused.do == (
        'PostgreSQL keeps a partitioned table unique only by keys that hold its partition key: if "id" is drawn from'
        " one sequence, or a UUID, say so with target.key_from_one_source: true; otherwise name another column in"
        " target.key;"
    )
    assert _gates(make_params(target={"key_from_one_source": True}))[KEY].verdict == "PASS"


def test_a_key_that_leads_no_index_is_refused(parted: psycopg.Connection[Any], make_params: MakeParams) -> None:
    parted.execute("ALTER TABLE articles DROP CONSTRAINT articles_pkey, ADD PRIMARY KEY (tenant, id)")
    refused = _gates(make_params())[KEY]
    assert (refused.verdict, refused.do) == (
        "FAIL",
        'make an index that begins with "id" on "public"."articles" and each partition;',
    )


def test_vectors_beside_need_a_key_that_a_foreign_key_may_point_to(
    parted: psycopg.Connection[Any], make_params: MakeParams
) -> None:
    refused = _gates(make_params(vector={"layout": "side_table"}))[KEY]
    assert (refused.verdict, refused.do) == (
        "FAIL",
        "set vector.layout: column, since a foreign key needs a unique index on the key alone;",
    )


def test_foreign_partitions_and_single_partitions_are_refused_by_name(
    parted: psycopg.Connection[Any], make_params: MakeParams
) -> None:
    # PostgreSQL lets no unique index stand beside a foreign partition.
    parted.execute(
        "ALTER TABLE articles DROP CONSTRAINT articles_pkey; CREATE EXTENSION file_fdw;"
        " CREATE SERVER files FOREIGN DATA WRAPPER file_fdw; CREATE FOREIGN"
        " TABLE old_years PARTITION OF articles FOR VALUES IN ('old') SERVER files OPTIONS (filename '/dev/null')"
    )
    gate = _gates(make_params())["inputs.partitions_are_tables"]
    assert str(gate) == (
        'FAIL    inputs.partitions_are_tables   "public"."articles"\n'
        "  found   public.old_years of 5 partitions: foreign\n"
        "  needed  one partition at least, and no foreign one\n"
        "  danger  no index can be built on a foreign table, so that of the whole table would never turn valid\n"
        "  do      detach the foreign partitions, or migrate the partitions of this server as targets of their own"
    )
    single = _gates(make_params(target={"table": "articles_acme"}))["inputs.table_is_no_partition"]
    assert (single.found, single.do) == ("a partition of articles", "name articles in target.table")
