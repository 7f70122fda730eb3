"""Hybrid on a large table: latency and relevance, against ranking every row that holds a word of the query.

    python -m tests.benchmarks.bench_hybrid [--rows 1000000] [--queries 200]

The demo's articles stand at random places among rows of four real passages each: WordNet's glosses, another
dictionary's definitions, and the catalogue's own passages. Its queries and judgements count; whatever else answers a
query counts as wrong. Wall times need an idle machine; the time of the server's processor is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
import yaml
from psycopg.conninfo import make_conninfo

from runbook_lib.benchmark import query_set, relevance_measures
from runbook_lib.benchmark.query_set import Query
from runbook_lib.cli import demo, embedded
from runbook_lib.core import db, session
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.target import load_params
from runbook_lib.embeddings import embedding
from runbook_lib.params import Params
from runbook_lib.params.data import Hybrid
from runbook_lib.search import search_function, statements, word_statistics
from tests.benchmarks import dictionaries

DSN_ENV = "RUNBOOK_HYBRID_DSN"
PASSAGES, EVERY_ROW, EF_SEARCH, BATCH = 150_000, 10**8, 100, 20_000
FILL = """
CREATE TABLE articles (id bigint, title text, body text, article bigint, embedding vector(256), tsv tsvector);
SELECT setseed(0.5);
INSERT INTO articles
SELECT i, a.title, concat_ws(E'\n', a.body, b.body, c.body, d.body), NULL,
       l2_normalize(a.embedding + b.embedding + c.embedding + d.embedding),
       a.tsv || setweight(b.tsv, 'B') || setweight(c.tsv, 'B') || setweight(d.tsv, 'B')
FROM (SELECT i, floor(random() * {n})::int AS a, floor(random() * {n})::int AS b, floor(random() * {n})::int AS c,
             floor(random() * {n})::int AS d FROM generate_series(1, {rows}) i) x
JOIN passage a ON a.n = x.a JOIN passage b ON b.n = x.b JOIN passage c ON c.n = x.c JOIN passage d ON d.n = x.d;
WITH k AS (SELECT *, row_number() OVER () AS place FROM article),
     w AS (SELECT id, row_number() OVER () AS place FROM (SELECT id FROM articles ORDER BY random()
                                                           LIMIT (SELECT count(*) FROM article)) s)
UPDATE articles t SET title = k.title, body = k.body, tsv = k.tsv, embedding = k.embedding, article = k.n
FROM k JOIN w USING (place) WHERE t.id = w.id;
ALTER TABLE articles ADD PRIMARY KEY (id);
CREATE INDEX ON articles USING gin (tsv);
SET maintenance_work_mem = '2GB';
CREATE INDEX ON articles USING hnsw (embedding vector_cosine_ops) WITH (m = 8, ef_construction = 24);
"""


def passages(articles: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Title and text."""
    yield from ((words, gloss) for words, gloss, _, _ in list(dictionaries.glosses())[::2])
    yield from ((text.split(" \\")[0][:60], text) for text in dictionaries.definitions(PASSAGES // 2))
    yield from ((title, body[:600]) for title, body, _, _ in demo._catalogue_passages(articles))


def fill(connection: psycopg.Connection[Any], params: Params, rows: int) -> None:
    """The table, from real texts, with its vectors and indexes."""
    model, weaknesses = embedding.model(params), demo._weaknesses()
    connection.execute("SET search_path = public")
    connection.execute("CREATE EXTENSION vector")
    session.register_vector(connection)
    texts = {
        "article": [(a.id, a.title, a.body) for a in map(demo._article, weaknesses)],
        "passage": [(n, *p) for n, p in enumerate(passages(weaknesses))],
    }
    for name, found in texts.items():
        connection.execute(
            f"CREATE TABLE {name} (n bigint PRIMARY KEY, title text, body text, embedding vector(256), tsv tsvector"
            " GENERATED ALWAYS AS (setweight(to_tsvector('english', title), 'A')"
            " || setweight(to_tsvector('english', body), 'B')) STORED)"
        )
        for begin in range(0, len(found), BATCH):
            batch = found[begin : begin + BATCH]
            vectors = np.asarray(model([f"{title}\n{body}" for _, title, body in batch]), np.float32)
            with connection.cursor().copy(
                f"COPY {name} (n, title, body, embedding) FROM STDIN WITH (FORMAT BINARY)"
            ) as copy:
                copy.set_types(["int8", "text", "text", "vector"])
                for row, vector in zip(batch, vectors, strict=True):
                    copy.write_row((*row, vector))
    for statement in FILL.format(n=len(texts["passage"]), rows=rows).split(";\n"):
        connection.execute(statement)
    connection.execute("VACUUM ANALYZE articles")


def parameters(folder: Path) -> Params:
    """Of the table, with the demo's queries and judgements, which are written there."""
    found = demo._queries(demo._weaknesses())
    with (folder / "queries.jsonl").open("w") as queries, (folder / "judgements.jsonl").open("w") as judgements:
        for text, keys in found.items():
            query_id = demo._query_id(text)
            queries.write(json.dumps({"query_id": query_id, "text": text}) + "\n")
            for key in keys:
                judgements.write(json.dumps({"query_id": query_id, "key": str(key), "relevance": 1}) + "\n")
    data = {
        "connection": {"dsn_env": DSN_ENV},
        "target": {"name": "articles", "table": "articles", "key": "id", "text_columns": ["title", "body"]},
        "vector": {"dimension": 256},
        "embeddings": {"source": "wordllama"},
        "legacy": {"query": "SELECT id FROM articles WHERE title ILIKE :query LIMIT :k"},
        "queries": {"file": "queries.jsonl", "judgements": "judgements.jsonl"},
        "search": {"fulltext_column": "tsv"},
    }
    (folder / "bench.yaml").write_text(yaml.safe_dump(data))
    return load_params(folder / "bench.yaml")


def install(connection: db.Connection, params: Params) -> None:
    """The search function, its tables, and the words counted."""
    ledger = Ledger(connection, params, "benchmark", "70_tune")
    if not ledger.exists():
        ledger.create()
    for name in ("create_route", "create_strategy", "create_way_to_search"):
        db.carry_out(connection, params, db.statement(search_function.SQL[name], params))
    db.carry_out(connection, params, search_function.create_statement(connection, params))
    if word_statistics.is_outdated(connection, params):
        db.carry_out(connection, params, word_statistics.count_statement(connection, params))


def ask(connection: db.Connection, params: Params, queries: Sequence[Query], articles: dict[int, str]) -> str:
    """One line: relevance and latency of hybrid."""
    statement = statements.route_statement(connection, params, "hybrid")
    backend = psutil.Process(connection.info.backend_pid)
    marks = query_set.read_judgements(params)
    seconds, busy, answers = [], backend.cpu_times().user, {}
    for query in (*queries[:5], *queries):
        started = time.perf_counter()
        bound = {"query": query.text, "embedding": query.vector, "k": 10}
        rows = connection.execute(statement, bound, prepare=False).fetchall()
        seconds.append(time.perf_counter() - started)
        answers[query.query_id] = [articles.get(row["key"], f"row {row['key']}") for row in rows]
    busy = (backend.cpu_times().user - busy) / len(seconds)
    judged = {q.query_id: marks[q.query_id] for q in queries}
    found = relevance_measures.relevance(answers, judged, ("nDCG@10",)).measures["nDCG@10"]
    p50, p95, worst = np.percentile(np.array(seconds[5:]) * 1000, [50, 95, 100])
    return (
        f"nDCG@10 {found:.4f}, p50 {p50:.1f} ms, p95 {p95:.1f}, worst {worst:.1f}; processor {1000 * busy:.1f} a call"
    )


def main() -> None:
    """Makes the table, asks bounded and unbounded."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=100_000)
    arguments.add_argument("--queries", type=int, default=200)
    options = arguments.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="runbook-hybrid-") as name,
        embedded.running(Path(name) / "data") as server,
    ):
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute("CREATE DATABASE hybrid")
        os.environ[DSN_ENV] = make_conninfo(server, dbname="hybrid")
        params = parameters(Path(name))
        with db.connect(params, "benchmark") as connection:
            fill(connection, params, options.rows)
            session.use_search_path(connection)
            queries = query_set.sample(query_set.read_queries(params), options.queries)
            queries = list(query_set.with_vectors(params, queries))
            rows = connection.execute("SELECT id, article FROM articles WHERE article IS NOT NULL").fetchall()
            connection.execute("SELECT set_config('hnsw.ef_search', %s, false)", [str(EF_SEARCH)])
            for what, most in (("bounded", params.search.hybrid.word_rows), ("every row", EVERY_ROW)):
                hybrid = Hybrid.model_construct(weights="equal", word_rows=most)
                search = params.search.model_copy(update={"hybrid": hybrid})
                asked = params.model_copy(update={"search": search})
                install(connection, asked)
                found = ask(connection, asked, queries, {r["id"]: str(r["article"]) for r in rows})
                print(f"{options.rows} rows, {len(queries)} queries, {what}: {found}", flush=True)


if __name__ == "__main__":
    main()
