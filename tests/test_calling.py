"""The calls of docs/guide.md, run as they are printed there, against the search function of the toy table."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import numpy
import pgvector.psycopg
import psycopg
import pytest
import sqlalchemy
from psycopg.conninfo import conninfo_to_dict

from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.search import search_function
from tests.test_search_function import call, keys, vector

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE.read_text().split("## Calling the search")[1], re.S)
WORDS = "cookie leaks"


def test_the_guide_shows_four_ways_to_call() -> None:
    named = ["psycopg.connect(dsn).execute", "register_vector", "sqlalchemy", "asyncpg"]
    assert len(EXAMPLES) == 4 and all(name in example for name, example in zip(named, EXAMPLES, strict=True))


@pytest.mark.parametrize("example", EXAMPLES, ids=["psycopg", "numpy", "sqlalchemy", "asyncpg"])
def test_the_example_finds_the_rows(
    open_phase: Callable[..., Phase], articles: psycopg.Connection[Any], database: str, example: str
) -> None:
    phase = open_phase("70_tune")
    for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    search_function.move_route(phase, "vector", 100, "test")
    parts = conninfo_to_dict(database)
    url = f"postgresql://{parts['user']}@/{parts['dbname']}?host={parts['host']}"
    names: dict[str, Any] = {
        "words": WORDS, "vector": vector(WORDS), "dsn": url, "url": url.replace("://", "+psycopg://"),
        "asyncio": asyncio,
        "asyncpg": asyncpg, "numpy": numpy, "pgvector": pgvector, "psycopg": psycopg, "sqlalchemy": sqlalchemy,
    }  # fmt: skip
    exec(example, names)
    found = [tuple(row) for row in names["found"]]
    assert [row[0] for row in found] == keys(call(articles, WORDS))
    assert {row[2] for row in found} == {"vector"}


def test_asyncpg_is_told_that_an_untyped_vector_is_text(open_phase: Callable[..., Phase], database: str) -> None:
    search_function.apply(open_phase("10_baseline"))
    parts = conninfo_to_dict(database)

    async def ask(value: Any) -> Any:
        connection = await asyncpg.connect(user=parts["user"], database=parts["dbname"], host=str(parts["host"]))
        try:
            return await connection.fetch("SELECT * FROM search_articles($1, $2, $3)", WORDS, value, 3)
        finally:
            await connection.close()

    assert len(asyncio.run(ask(str(vector(WORDS))))) == 3
    assert len(asyncio.run(ask(None))) == 3
    with pytest.raises(asyncpg.DataError, match="expected str, got list"):
        asyncio.run(ask(vector(WORDS)))
