"""A run as it would stand in manifest and ledger, complete and made up, for the tests of the record."""

from __future__ import annotations

from typing import Any

from runbook_lib.core.registry import MIGRATE
from runbook_lib.runner.manifest import Manifest, PhaseRun

RUN_ID = "20261122T190501Z-articles"
SECONDS = (2.1, 9.4, 1.9, 2.2, 6.3, 5.1, 4.9, 8.8, 7.6, 4.2)


MOVED = {
    "better": 1203, "worse": 301, "alike": 389,
    "gains": [{"query_id": "q1", "difference": 1.0, "before": None, "after": [1, "41"]},
              {"query_id": "q2", "difference": 0.3, "before": [7, "40"], "after": [2, "42"]}],
    "losses": [{"query_id": "q3", "difference": -1.0, "before": [1, "43"], "after": None}],
}  # fmt: skip


def make_manifest(**changes: Any) -> Manifest:
    """A migration that passed; keyword arguments replace fields."""
    phases = tuple(
        PhaseRun(name, "passed", f"2026-11-22T19:05:{i * 5:02}+00:00", seconds, "", f"{i:x}" * 64)
        for i, (name, seconds) in enumerate(zip(MIGRATE, SECONDS, strict=True))
    )
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "target": "articles",
        "table": "public.articles",
        "way": "migrate",
        "execute": True,
        "status": "passed",
        "exit_code": 0,
        "started": "2026-11-22T19:05:01+00:00",
        "finished": "2026-11-22T19:05:54+00:00",
        "params_file": "/srv/runbook/params/articles.yaml",
        "parameters": {"connection": {"dsn_env": "ARTICLES_DSN"}, "legacy": {"query": "a < b & c = '<i>'"}},
        "versions": {"python": "3.12.4", "runbook": "0.1.0", "PostgreSQL": "18.6", "pgvector": "0.8.6"},
        "phases": phases,
        "host": "db-tools",
        "pid": 1,
    }
    return Manifest(**fields | changes)


def entry(phase: str, kind: str, body: dict[str, Any], run_id: str = RUN_ID) -> dict[str, Any]:
    """One row of the ledger."""
    writer = {"written_by": "migrator", "hash": "e" * 64}
    return {"run_id": run_id, "target": "articles", "phase": phase, "kind": kind, "body": body} | writer


def gate(name: str, verdict: str = "PASS", **changes: Any) -> dict[str, Any]:
    """The body of a gate's row."""
    body = {
        "name": name,
        "verdict": verdict,
        "subject": "public.articles",
        "found": "938 of 938 rows",
        "needed": "every row that has text",
        "danger": "rows without a vector are never found",
        "do": "run the phase again",
        "figures": {"rows": 938, "missing": 0},
    }
    return body | changes


def statement(purpose: str, lock: str, seconds: float, **changes: Any) -> dict[str, Any]:
    """The body of a statement's row."""
    blocks = {"ACCESS EXCLUSIVE": "every read and write", "SHARE ROW EXCLUSIVE": "writes"}
    body = {
        "name": "schema.add",
        "purpose": purpose,
        "lock": lock,
        "blocks": next((b for level, b in blocks.items() if lock.startswith(level)), "nobody"),
        "undo": "schema.drop_column",
        "sql": 'ALTER TABLE "public"."articles"\n    ADD COLUMN "embedding" vector(256);',
        "rows": -1,
        "seconds": seconds,
        "tries": 1,
    }
    return body | changes


def system(ndcg: float, p50_ms: float) -> dict[str, float]:
    """Relevance and latency of one search."""
    measures = {"nDCG@10": ndcg, "RR": ndcg * 1.05, "R@10": ndcg * 1.3, "R@100": ndcg * 1.9, "P@10": ndcg / 6}
    return measures | {"p50_ms": p50_ms, "p95_ms": p50_ms * 2.1, "p99_ms": p50_ms * 3.2}


def make_entries() -> list[dict[str, Any]]:
    """The ledger of that migration."""
    points = [
        (20, 0.861, 0.52, 3),
        (40, 0.932, 0.71, 0),
        (80, 0.974, 1.04, 0),
        (160, 0.991, 1.73, 0),
        (320, 0.998, 3.1, 0),
    ]
    add, trigger, column = (
        "Add the vector column.",
        "Capture rows whose text changes.",
        "ACCESS EXCLUSIVE on the target",
    )
    entries = [
        entry("00_preflight", "plan", {
            "fingerprint": "f" * 64, "server_version": "18.6", "table_rows": 938, "table_bytes": 2_400_000,
            "indexes_bytes": 900_000, "params": {},
            "forecast": {"index_bytes": 1_600_000, "build_memory_bytes": 1_900_000, "table_growth_bytes": 1_100_000,
                         "wal_bytes": 4_100_000},
        }),
        entry("00_preflight", "gate", gate("preflight.key_is_unique")),
        entry("10_baseline", "gate", gate("search.function_answers_as_legacy")),
        entry("10_baseline", "baseline", {"systems": {"legacy": system(0.221, 14.2)}}),
        entry("10_baseline", "statement", statement("Make the search function.", "", 0.011, sql="CREATE …;")),
        entry("20_extension", "gate", gate("extension.is_new_enough", found="0.8.6", needed="≥ 0.8.2")),
        entry("30_expand_schema", "statement", statement(add, column, 0.312, tries=2)),
        entry("30_expand_schema", "statement", statement(trigger, "SHARE ROW EXCLUSIVE on the target", 0.004)),
        entry("30_expand_schema", "gate", gate("schema.column_has_type")),
        entry("40_load_embeddings", "load", {"rows": 938, "seconds": 1.4, "samples": [[0, 0], [1.4, 938]]}),
        entry("50_backfill", "backfill", {
            "rows": 938, "seconds": 0.92, "batches": 10, "batch_p50_ms": 88.0, "batch_p95_ms": 121.0,
            "samples": [[0.0, 0]] + [[round(0.09 * i, 2), min(938, 100 * i)] for i in range(1, 11)],
        }),
        entry("50_backfill", "gate", gate("backfill.no_row_is_missing")),
        entry("50_backfill", "gate", gate("backfill.no_row_is_stale")),
        entry("60_build_index", "statement", statement(
            "Build the index beside reads and writes.", "SHARE UPDATE EXCLUSIVE on the target", 1.21,
            sql="CREATE INDEX CONCURRENTLY …;")),
        entry("60_build_index", "index", {
            "name": "articles_embedding_hnsw", "method": "hnsw", "seconds": 1.21, "bytes": 1_523_712, "notices": [],
            "samples": [[0.0, 0, 120], [1.2, 120, 120]],
        }),
        entry("60_build_index", "gate", gate("index.is_valid")),
        entry("70_tune", "tuning", {
            "k": 10, "queries": 200, "exact_p50_ms": 4.4, "target_recall": 0.95, "chosen": 80,
            "points": [{"setting": "hnsw.ef_search", "value": v, "recall": r, "p50_ms": p, "p95_ms": p * 1.8,
                        "rows_short": s} for v, r, p, s in points],
        }),
        entry("70_tune", "gate", gate("tune.recall_is_reached")),
        entry("80_shadow", "shadow", {
            "k": 10, "judged": 1893, "timed": 200, "winner": "hybrid", "moved": MOVED,
            "systems": {"legacy": system(0.221, 14.2), "exact": system(0.312, 4.4), "vector": system(0.309, 1.1),
                        "hybrid": system(0.368, 2.6)},
        }),
        entry("80_shadow", "gate", gate("cutover.relevance_is_kept")),
        entry("90_cut_over", "route", {"route": "hybrid", "share_percent": 100, "reason": "last step"}),
        entry("90_cut_over", "gate", gate("cutover.canary_holds")),
    ]  # fmt: skip
    return entries + [entry(p, "phase", {"verdict": "PASS"}) for p in MIGRATE]
