"""Operate 50 on WordNet: what each index holds, takes and finds; judged by the headwords of another dictionary.

A query is a definition without its headword; the glosses of that word are right.

pytest -s tests/benchmarks/bench_storage.py
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runbook_lib.benchmark import charts
from runbook_lib.benchmark.storage_variants import StorageComparison
from runbook_lib.core.phase import Phase
from runbook_lib.operate import compare_storage
from tests.benchmarks import dictionaries

JUDGED = 1000
# A word of more meanings says too little about which gloss is meant.
MOST_MEANINGS = 3
ENTRY = re.compile(r"^([A-Z][a-z]{3,}) \\[^\\\n]+\\,? [^\n]*\n((?:   [^\n]+\n)+)", re.M)


def entries() -> Iterator[tuple[str, str]]:
    """Headword and definition, without the headword and its nearest forms."""
    text = gzip.decompress(dictionaries.GCIDE.read_bytes()).decode("utf-8", "replace")
    for word, body in ENTRY.findall(text):
        plain = " ".join(re.sub(r"\[[^\]]*\]|[{}]|^\s*\d+\.", "", body).split())
        stem = re.escape(word[: max(4, len(word) - 2)])
        plain = re.sub(rf"\b{stem}\w*", "", plain, flags=re.I).strip()
        if 40 <= len(plain) <= 300:
            yield word.lower(), plain


def write_judged(phase: Phase, folder: Path) -> None:
    """queries.jsonl and judgements.jsonl of that folder."""
    rows = phase.connection.execute("SELECT id, words FROM glosses").fetchall()
    by_word: dict[str, list[int]] = {}
    for row in rows:
        for word in row["words"].lower().split(", "):
            by_word.setdefault(word, []).append(row["id"])
    known = [(w, d) for w, d in entries() if 1 <= len(by_word.get(w, ())) <= MOST_MEANINGS]
    chosen = known[:: max(1, len(known) // JUDGED)][:JUDGED]
    with (folder / "queries.jsonl").open("w") as queries, (folder / "judgements.jsonl").open("w") as judgements:
        for i, (word, definition) in enumerate(chosen):
            queries.write(json.dumps({"query_id": f"d{i}", "text": definition}) + "\n")
            for key in by_word[word]:
                judgements.write(json.dumps({"query_id": f"d{i}", "key": str(key), "relevance": 1}) + "\n")


@dictionaries.needed
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", [0.95])
def test_the_table_before_the_choice(dictionary: Callable[..., Phase], tmp_path: Path, target: float) -> None:
    write_judged(dictionary(), tmp_path)
    queries = {name: str(tmp_path / f"{name}.jsonl") for name in ("queries", "judgements")}
    phase = dictionary(
        tune={"target_recall": target},
        queries={
            "file": queries["queries"],
            "judgements": queries["judgements"],
            "sample": 200,
            "judged_sample": 500,
        },
        storage={"sample_rows": 1_000_000},
    )
    found = compare_storage.apply(phase)
    assert isinstance(found, StorageComparison)
    print(f"\n{found}\n{json.dumps(found.as_data())}")
    Path(tmp_path, "storage.svg").write_text(charts.bytes_against_recall(found.as_data()))
    assert [str(g) for g in compare_storage.verify(phase) if g.verdict != "PASS"] == []
    by_title = {r["title"]: r for r in found.found}
    today, half = by_title["vector, as it is"], by_title["halfvec"]
    bits = sorted((r for r in found.found if r["held"] == "bit"), key=lambda r: r["rerank"])
    assert found.facts["rows"] >= 100_000
    assert half["reaches"] and half["bytes"] < 0.75 * today["bytes"]
    # 256 bits of a static model are coarse: the deeper, the better, and what they miss no setting finds.
    assert [r["recall"] for r in bits] == sorted(r["recall"] for r in bits) and bits[-1]["bytes"] < 0.4 * today[
        "bytes"
    ]
    assert half["ndcg"] == pytest.approx(today["ndcg"], abs=0.01)
