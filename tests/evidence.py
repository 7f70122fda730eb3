"""Evidence that nothing was lost: every row is held against an embedding made again of the text it has now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg

from tests import toy

IN_THE_TABLE = (
    "SELECT id, concat_ws(E'\\n', title, body), embedding::real[], embedding_updated_at FROM articles ORDER BY id"
)
BESIDE_IT = """
    SELECT a.id, concat_ws(E'\\n', title, body), e.embedding::real[], e.embedding_updated_at
    FROM articles a LEFT JOIN articles_embedding e ON e.id = a.id ORDER BY a.id
"""


@dataclass(frozen=True)
class Evidence:
    """Counts over the whole table. wrong: a vector that is not the one of the row's text. orphans: one of no row."""

    with_text: int
    missing: int
    wrong: int
    without_text_but_vector: int
    orphans: int = 0

    @property
    def lost(self) -> int:
        return self.missing + self.wrong + self.without_text_but_vector + self.orphans


def gather(articles: psycopg.Connection[Any], layout: str = "column") -> Evidence:
    """Embeds every text anew, outside the runbook, and compares."""
    beside = layout == "side_table"
    rows = articles.execute(BESIDE_IT if beside else IN_THE_TABLE).fetchall()
    with_text = [r for r in rows if r[1].strip()]
    given = [r for r in with_text if r[2] is not None]
    vectors = toy.embed([r[1] for r in given])
    right = [np.allclose(r[2], v, atol=1e-6) and r[3] is not None for r, v in zip(given, vectors, strict=True)]
    orphans = "SELECT count(*) FROM articles_embedding e WHERE NOT EXISTS (SELECT FROM articles a WHERE a.id = e.id)"
    found = articles.execute(orphans).fetchone() if beside else None
    return Evidence(
        with_text=len(with_text),
        missing=len(with_text) - len(given),
        wrong=len(given) - sum(right),
        without_text_but_vector=sum(r[2] is not None for r in rows if not r[1].strip()),
        orphans=found[0] if found else 0,
    )


def assert_every_row_has_the_vector_of_its_text(articles: psycopg.Connection[Any], layout: str = "column") -> int:
    """Fails where anything was lost; returns the rows with text."""
    found = gather(articles, layout)
    assert found == Evidence(found.with_text, 0, 0, 0, 0)
    return found.with_text
