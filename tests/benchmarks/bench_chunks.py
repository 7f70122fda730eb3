"""Long texts with one vector each, and with one a chunk: PostgreSQL's own documentation, asked by its index.

    apt-get download postgresql-doc-15 && dpkg -x postgresql-doc-15_*.deb doc
    python -m tests.benchmarks.bench_chunks doc/usr/share/doc/postgresql-doc-15/html [--sizes 500 1000 2000]

Each page is a row: its title, and its text. Each entry of the book's index is a query, and right are the pages that
it leads to. Every arm is a table of its own, taken through phases 30 to 60 with the packaged model. nDCG@10 and
recall@10 against exact answers are of the vector route's own statement, its time is measured arm by arm in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import io
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import yaml

from runbook_lib.benchmark import exact, loop, query_set, relevance_measures
from runbook_lib.benchmark.query_set import Query
from runbook_lib.cli import embedded
from runbook_lib.core import db
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.search import statements
from tests.opened import opened_for_a_while

DSN_ENV = "RUNBOOK_BENCH_DSN"
K, EF_SEARCH, ROUNDS = 10, 100, 3
TAGS = re.compile(r"<(script|style).*?</\1>|<[^>]+>", re.S)
# An entry of the index, or one below it.
ENTRY = re.compile(r"(<dt[^>]*>)(.*?)</dt>|(<dd><dl>)|(</dl></dd>)", re.S)


def text_of(markup: str) -> str:
    """What a reader sees: paragraphs stay paragraphs."""
    broken = re.sub(r"</(p|div|pre|h\d|li|dt|dd|tr)>", "\n\n", markup)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", html.unescape(TAGS.sub("", broken)))).strip()


def pages(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Name, title and text of each page; the index itself and lists of contents are none."""
    for path in sorted(folder.glob("*.html")):
        whole = path.read_text("utf-8", errors="replace")
        title = re.search(r"<title>(.*?)</title>", whole, re.S)
        body = re.search(r'<div class="navheader">.*?<hr ?/?></div>(.*)<div class="navfooter">', whole, re.S)
        if title and body and path.name not in ("bookindex.html", "index.html"):
            yield path.name, html.unescape(title[1]), text_of(re.sub(r'<div class="toc">.*?</div>', "", body[1]))


def index_terms(folder: Path, known: set[str]) -> dict[str, set[str]]:
    """Entries of the index, those below others with them, and the pages that they lead to."""
    source = (folder / "bookindex.html").read_text("utf-8")
    found: dict[str, set[str]] = {}
    above: list[str] = []
    last = ""
    for entry in ENTRY.finditer(source[source.index('<div class="index') :]):
        if entry[3]:
            above.append(last)
        elif entry[4]:
            above.pop()
        else:
            last = text_of(entry[2].split('<a class="indexterm"')[0]).rstrip(", \n")
            led = set(re.findall(r'href="([^"#]+)', entry[2])) & known
            if led and re.search(r"[a-z]{3}", last) and "(see" not in last:
                found.setdefault(" ".join([*filter(None, above), last]), set()).update(led)
    return found


@contextlib.contextmanager
def opened(folder: Path, arm: str, chunks: dict[str, Any] | None) -> Iterator[Phase]:
    """A phase on this arm's own copy of the table."""
    data = {
        "connection": {"dsn_env": DSN_ENV},
        "target": {"name": arm, "table": arm, "key": "page", "text_columns": ["title", "body"]},
        "vector": {"dimension": 256},
        "embeddings": {"source": "wordllama"} | ({"chunks": chunks} if chunks else {}),
        "legacy": {"query": f"SELECT page FROM {arm} WHERE body ILIKE :query LIMIT :k"},
        "queries": {"file": "queries.jsonl"},
    }
    path = folder / f"{arm}.yaml"
    path.write_text(yaml.safe_dump(data))
    with opened_for_a_while(load_params(path)) as phase:
        yield phase


def prepare(phase: Phase, arm: str) -> dict[str, float]:
    """Phases 30 to 60; seconds and sizes."""
    took: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        phase.ledger.create()
        extension.apply(phase)
        db.use_search_path(phase.connection)
        for module in (expand_schema, load_embeddings, backfill, build_index):
            began = time.perf_counter()
            module.apply(phase)
            took[module.__name__.rpartition(".")[2]] = time.perf_counter() - began
    beside = f"{arm}_embedding"
    row = phase.connection.execute(
        "SELECT pg_relation_size(to_regclass(%s)) AS index, coalesce(pg_table_size(to_regclass(%s)), 0) AS beside,"
        " coalesce((SELECT reltuples FROM pg_class WHERE oid = to_regclass(%s)), 0)::bigint AS chunks",
        [f"{arm}_embedding_hnsw", beside, beside],
    ).fetchone()
    return took | {k: float(v) for k, v in dict(row or {}).items()}


def ask(phase: Phase, queries: list[Query]) -> loop.Answers:
    """The vector route's statement: warm, then timed."""
    with db.connect(phase.params, "bench search") as connection:
        connection.execute("SELECT '[1]'::vector")
        connection.execute(f"SET hnsw.ef_search = {EF_SEARCH}; SET hnsw.iterative_scan = strict_order")
        statement = statements.route_statement(phase.connection, phase.params, "vector")
        assert loop.planned(connection, phase.params, statement, queries[0]).indexes, "the plan reads no vector index"
        loop.ask(connection, phase.params, statement, queries[:50], K)
        return loop.ask(connection, phase.params, statement, queries, K)


def main() -> int:
    """Measures and prints."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--sizes", nargs="+", type=int, default=[500, 1000, 2000])
    options = arguments.parse_args()
    rows = list(pages(options.folder))
    terms = index_terms(options.folder, {name for name, _, _ in rows})
    lengths = sorted(len(body) for _, _, body in rows)
    print(
        f"{len(rows)} pages, median {statistics.median(lengths):,.0f} characters, p90"
        f" {lengths[len(lengths) * 9 // 10]:,}, longest {lengths[-1]:,}; {len(terms)} queries"
    )
    arms: dict[str, dict[str, Any] | None] = {"whole": None}
    for size in options.sizes:
        arms[f"chunks_{size}"] = {"size": size, "overlap": size // 10}
    arms[f"titled_{options.sizes[0]}"] = {"size": options.sizes[0], "overlap": options.sizes[0] // 10, "title": True}
    with tempfile.TemporaryDirectory(prefix="runbook-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "queries.jsonl").write_text(
            "".join(json.dumps({"query_id": str(i), "text": term}) + "\n" for i, term in enumerate(terms))
        )
        dsn = stack.enter_context(embedded.running(folder / "data"))
        os.environ[DSN_ENV] = dsn
        judged = {str(i): dict.fromkeys(right, 1) for i, right in enumerate(terms.values())}
        found: dict[str, dict[str, Any]] = {}
        for arm, chunks in arms.items():
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute(f"CREATE TABLE {arm} (page text PRIMARY KEY, title text, body text)")
                with connection.cursor() as cursor:
                    cursor.executemany(f"INSERT INTO {arm} VALUES (%s, %s, %s)", rows)
                connection.execute(f"VACUUM ANALYZE {arm}")
            phase = stack.enter_context(opened(folder, arm, chunks))
            found[arm] = {"phase": phase, **prepare(phase, arm), "seconds": []}
            queries = query_set.with_vectors(phase.params, query_set.read_queries(phase.params))
            found[arm]["queries"] = exact.answered(phase.connection, phase.params, queries, K)
        for _ in range(ROUNDS):
            for own in found.values():
                own["answers"] = ask(own["phase"], own["queries"])
                own["seconds"] += own["answers"].seconds
        print("arm, vectors, load s, build s, index MB, table beside MB, recall@10, nDCG@10, R@10, P@1, p50, p95")
        for arm, own in found.items():
            answers = own["answers"]
            keys = {q.query_id: [key for key, _ in r] for q, r in zip(answers.queries, answers.rows, strict=True)}
            relevance = relevance_measures.relevance(keys, judged, ("nDCG@10", "R@10", "P@1")).measures
            times = relevance_measures.latency(own["seconds"])
            assert all(len(set(k)) == len(k) == K for k in keys.values()), "fewer rows than asked for"
            print(
                f"{arm}, {own['chunks'] or len(rows):.0f}, {own['load_embeddings']:.1f}, {own['build_index']:.1f},"
                f" {own['index'] / 1e6:.1f}, {own['beside'] / 1e6:.1f}, {answers.recall().mean:.3f},"
                f" {', '.join(f'{v:.3f}' for v in relevance.values())}, {times['p50_ms']:.2f}, {times['p95_ms']:.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
