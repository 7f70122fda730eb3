"""A table whose vectors a thin index cannot tell apart: tuning says what to build, and what it says is enough."""

import re
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
import psycopg
import pytest

from runbook_lib.benchmark import query_set
from runbook_lib.core import db
from runbook_lib.core.phase import Phase
from runbook_lib.embeddings.embedding import Vectors
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings, tune
from runbook_lib.operate import rebuild_index
from runbook_lib.search import search_function
from tests.test_search_function import FILTERED

Open = Callable[..., Phase]

ROWS, DIMENSION, K = 3000, 24, 10
TARGET = 0.95
THIN = {"m": 4, "ef_construction": 8}
MOST_ROUNDS = 3


def scattered(texts: list[str]) -> Vectors:
    """Directions drawn evenly, the same for the same text: no neighbourhoods that an index could follow."""
    seeds = [int.from_bytes(sha256(text.encode()).digest()[:8]) for text in texts]
    return np.array([np.random.default_rng(s).standard_normal(DIMENSION) for s in seeds], np.float32)


@pytest.fixture
def opened(open_phase: Open, articles: psycopg.Connection[Any]) -> Open:
    """Opens phases and operations on three thousand such rows."""
    articles.execute("ALTER TABLE articles SET (autovacuum_enabled = off)")
    articles.execute("DELETE FROM articles")
    articles.execute(
        "INSERT INTO articles (title, body) SELECT '', 'text ' || n FROM generate_series(1, %s) n", [ROWS]
    )
    for setting in ("enable_seqscan", "enable_sort"):
        articles.execute(f"ALTER DATABASE {articles.info.dbname} SET {setting} = off")  # type: ignore[call-overload]

    def make(name: str, options: dict[str, int]) -> Phase:
        return open_phase(
            name,
            **FILTERED
            | {
                "target": {"filters": []},
                "legacy": {},
                "embeddings": {"source": "callable", "callable": "tests.test_denser_index:scattered"},
                "vector": {"dimension": DIMENSION},
                "index": options,
                "tune": {"queries": 100, "ef_search": [20, 40], "target_recall": TARGET},
            },
        )

    return make


def recall(phase: Phase, ef_search: int) -> float:
    """Of the index, against a matrix product over the vectors that the texts have, at one setting."""
    keys, texts = zip(
        *(
            (r["id"], r["t"])
            for r in phase.connection.execute("SELECT id, concat_ws(E'\\n', title, body) AS t FROM articles")
        ),
        strict=True,
    )
    rows = scattered(list(texts))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries = query_set.read_queries(phase.params)
    shares = []
    with phase.connection.transaction():
        phase.connection.execute(f"SET LOCAL hnsw.ef_search = {ef_search}")  # type: ignore[call-overload]
        for vector in scattered([q.text for q in queries]):
            nearest = {keys[i] for i in np.argsort(-(rows @ vector))[:K]}
            found = phase.connection.execute(
                "SELECT id FROM articles ORDER BY embedding <=> %s::real[]::vector LIMIT %s",
                [[float(x) for x in vector], K],
            ).fetchall()
            shares.append(len(nearest & {r["id"] for r in found}) / K)
    return float(np.mean(shares))


def test_what_tuning_says_to_build_brings_the_recall_that_was_missing(opened: Open) -> None:
    options, highest = dict(THIN), 40
    phase = opened("70_tune", options)
    for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    db.use_search_path(phase.connection)
    thin = recall(phase, highest)
    rounds = []
    for _ in range(MOST_ROUNDS):
        tune.apply(phase)
        judged = next(g for g in tune.verify(phase) if g.name == "tune.target_recall_is_reached")
        rounds.append((dict(options), str(judged.verdict)))
        if judged.verdict == "PASS":
            break
        told = re.search(
            r"finds 0\.\d+ in .* Build again with index\.m: (\d+) and index\.ef_construction: (\d+)$", judged.do
        )
        assert told, judged.do
        options = {"m": int(told[1]), "ef_construction": int(told[2])}
        again = opened("operate/rebuild_index", options)
        rebuild_index.apply(again)
        proved = {g.name: g for g in rebuild_index.verify_new(again)}
        assert "rebuild.new_index_finds_as_much" in proved, proved
        proof = proved["rebuild.new_index_finds_as_much"]
        assert proof.verdict == "PASS" and proof.figures["after"] > proof.figures["before"]
        rebuild_index.swap(again)
        assert rebuild_index.verify(again).passed
        phase = opened("70_tune", options)
        db.use_search_path(phase.connection)
    assert [verdict for _, verdict in rounds] == ["FAIL"] * (len(rounds) - 1) + ["PASS"] and len(rounds) > 1
    assert all(o == {"m": 4 << n, "ef_construction": 8 << n} for n, (o, _) in enumerate(rounds))
    assert thin < 0.7 and recall(phase, highest) >= TARGET
