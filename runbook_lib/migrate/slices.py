"""Classes of queries, and which of them the new search answers worse: what users will notice first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from runbook_lib.benchmark import relevance_measures
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db, row_counts
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("compare")

SHORT_WORDS = 3
# A word is rare that at most so many of the rows looked at hold, and no more than this share of them: in a table of
# a few thousand rows the share alone would take in words that everybody uses.
RARE_ROWS, RARE_SHARE = 5, 0.005
ROWS_LOOKED_AT = 50_000
CODES_AND_NAMES = re.compile(r"[0-9_()]|[a-z][A-Z]")
# Fewer queries than these say nothing about their class.
FEWEST_QUERIES = 5
NAMES = ("short", "long", "rare words", "codes and names", "no hit in legacy")

Scores = Mapping[str, float]


def classes(
    connection: db.Connection, params: Params, queries: Sequence[Query], unanswered: set[str]
) -> dict[str, list[str]]:
    """Query ids by class; a query may be in several. unanswered: ids of those for which legacy finds nothing."""
    words = _words(connection, params, [q.text for q in queries])
    rare = rare_words(connection, params, {w for found in words.values() for w in found})
    short = {q.query_id for q in queries if len(q.text.split()) <= SHORT_WORDS}
    return {
        "short": [q.query_id for q in queries if q.query_id in short],
        "long": [q.query_id for q in queries if q.query_id not in short],
        "rare words": [q.query_id for q in queries if rare & words[q.text]],
        "codes and names": [q.query_id for q in queries if CODES_AND_NAMES.search(q.text)],
        "no hit in legacy": [q.query_id for q in queries if q.query_id in unanswered],
    }


def _words(connection: db.Connection, params: Params, texts: Sequence[str]) -> dict[str, set[str]]:
    found = db.rows(connection, SQL["words"], params, texts=list(dict.fromkeys(texts)))
    return {row["text"]: set(row["words"]) for row in found}


def rare_words(connection: db.Connection, params: Params, words: set[str]) -> set[str]:
    """Those of the words that few rows hold, or none; counted in a sample of the pages where the table is large."""
    percent = min(100.0, 100.0 * ROWS_LOOKED_AT / max(row_counts.of(connection, params).n, 1))
    found = db.rows(connection, SQL["document_frequency"], params, words=sorted(words), percent=percent)
    return words - {row["word"] for row in found if row["rows"] > RARE_ROWS or row["share"] > RARE_SHARE}


def compare(groups: Mapping[str, Sequence[str]], scores: Mapping[str, Scores], route: str) -> list[dict[str, Any]]:
    """Legacy against the route, class by class. scores: nDCG@10 by system and query id, of the same queries.

    Where legacy wins, ``blame`` says what loses: the model (exact search loses too), the index (exact search does
    not), or the fusion (neither does). lost_by_…: queries that legacy answers better, by the same rule.
    """
    found = []
    for name, ids in groups.items():
        if len(ids) < FEWEST_QUERIES:
            continue
        part = {system: {i: by_query[i] for i in ids} for system, by_query in scores.items()}
        pair = relevance_measures.paired(part["legacy"], part[route])
        means = {system: sum(by_query.values()) / len(ids) for system, by_query in part.items()}
        lost = [_blame({s: by_query[i] for s, by_query in part.items()}, route) for i in ids]
        found.append(
            {
                "slice": name,
                "queries": len(ids),
                "legacy": round(means["legacy"], 4),
                "route": round(means[route], 4),
                "exact": round(means["exact"], 4),
                **pair.as_data(),
                "blame": _blame(means, route),
                "lost_by_model": lost.count("model"),
                "lost_by_index": lost.count("index"),
                "lost_by_fusion": lost.count("fusion"),
            }
        )
    return found


def _blame(score: Scores, route: str) -> str:
    if score[route] >= score["legacy"]:
        return ""
    if score["exact"] < score["legacy"]:
        return "model"
    return "index" if score["vector"] < score["exact"] else "fusion"


def where_legacy_wins(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the classes where legacy is better, with how sure that is and what loses."""
    return [
        f"{s['slice']} ({s['queries']} queries, {s['difference']:+.3f}, p = {s['p_value']:.2g}, by the {s['blame']})"
        for s in found
        if s["difference"] < 0
    ]
