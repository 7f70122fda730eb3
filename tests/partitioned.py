"""The toy table, partitioned: by a list of tenants with partitions below one of them, by ranges and by hash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import psycopg
import pytest

from runbook_lib.core import db
from runbook_lib.core.phase import Phase
from tests import toy

Kind = Literal["list", "range", "hash"]
TENANTS = ("acme", "bolt", "crux", "dune")

PARTITIONS: dict[Kind, str] = {
    # A key that is unique only with the tenant; one tenant has partitions of its own, the last two none.
    "list": """
        CREATE TABLE articles_acme PARTITION OF articles FOR VALUES IN ('acme');
        CREATE TABLE articles_bolt PARTITION OF articles FOR VALUES IN ('bolt') PARTITION BY HASH (id);
        CREATE TABLE articles_bolt_0 PARTITION OF articles_bolt FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE articles_bolt_1 PARTITION OF articles_bolt FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        CREATE TABLE articles_rest PARTITION OF articles DEFAULT;
    """,
    "range": """
        CREATE TABLE articles_low PARTITION OF articles FOR VALUES FROM (MINVALUE) TO (101);
        CREATE TABLE "Articles High %" PARTITION OF articles FOR VALUES FROM (101) TO (10000);
    """,
    "hash": """
        CREATE TABLE articles_h0 PARTITION OF articles FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE articles_h1 PARTITION OF articles FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    """,
}
BY = {"list": "LIST (tenant)", "range": "RANGE (id)", "hash": "HASH (id)"}
KEY = {"list": "(id, tenant)", "range": "(id)", "hash": "(id)"}


def create_articles(connection: psycopg.Connection[Any], kind: Kind, *, trigram: bool = True) -> None:
    """Table public.articles with the rows of the toy table, and a tenant each."""
    connection.execute(
        f"""
        CREATE SEQUENCE articles_id_seq;
        CREATE TABLE articles (
            id bigint NOT NULL DEFAULT nextval('articles_id_seq'), tenant text NOT NULL,
            title text, body text, status text NOT NULL DEFAULT 'Stable', views int NOT NULL DEFAULT 0,
            padding text NOT NULL DEFAULT repeat('x', 1500),
            tsv tsvector GENERATED ALWAYS AS
                (to_tsvector('english', coalesce(title, '') || ' ' || coalesce(body, ''))) STORED,
            PRIMARY KEY {KEY[kind]}
        ) PARTITION BY {BY[kind]};
        {PARTITIONS[kind]}
        CREATE INDEX articles_tsv ON articles USING gin (tsv);
        """
    )
    if trigram:
        connection.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")
        connection.execute("CREATE INDEX articles_trgm ON articles USING gin (title gin_trgm_ops, body gin_trgm_ops)")
    texts = [(f"{s} {v}", f"the {s} {v} {p}") for s in toy.SUBJECTS for v in toy.VERBS for p in toy.PLACES]
    rows = [(TENANTS[i % len(TENANTS)], *text) for i, text in enumerate(texts)]
    with connection.cursor() as cursor:
        cursor.executemany("INSERT INTO articles (tenant, title, body) VALUES (%s, %s, %s)", rows)
    connection.execute("INSERT INTO articles (tenant, title, body) VALUES ('acme', NULL, '  ')")
    connection.execute("ANALYZE articles")


def leaves(connection: psycopg.Connection[Any]) -> list[str]:
    """The partitions that hold rows, as PostgreSQL itself lists them."""
    found = connection.execute(
        "SELECT relid::regclass::text FROM pg_partition_tree('articles') WHERE isleaf ORDER BY 1"
    )
    return [row[0] for row in found]


def index_state(connection: psycopg.Connection[Any]) -> dict[str, tuple[bool, bool]]:
    """Of every vector index: is it valid, and is it attached to another?"""
    found = connection.execute(
        "SELECT c.oid::regclass::text, i.indisvalid AND i.indisready, c.relispartition FROM pg_index i"
        " JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam"
        " WHERE m.amname IN ('hnsw', 'ivfflat')"
    )
    return {name: (valid, attached) for name, valid, attached in found}


@contextmanager
def killed_after(module: ModuleType, builds: int) -> Iterator[None]:
    """What is done within is killed where a module that builds partition by partition begins the next one."""
    real, done = module.concurrently, list[str]()

    def concurrently(phase: Phase, statement: db.Statement, index: str = "") -> Any:
        if len(done) == builds:
            raise KeyboardInterrupt
        done.append(statement.name)
        return real(phase, statement, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "concurrently", concurrently)
        yield
