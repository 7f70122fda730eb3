"""The record's smaller tables: filters, classes of queries, and how the backfill went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runbook_lib.core.display import size

# A title, column heads, and rows; each from one body of the ledger, which an older run may have written without it.
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


def filters(tuning: Mapping[str, Any]) -> Table | None:
    """The way that the search function takes for each class of filter, beside common practice."""
    rows = []
    for c in tuning.get("classes") or ():
        if c["column"] and (chosen := c.get("chosen")):
            scan = chosen["scan"]
            way = scan if scan == "exact" else f"{scan}, {chosen['candidates']} candidates"
            practice = c.get("practice") or {}
            rows.append(
                (
                    f"{c['column']}, {c['bucket']} of the rows",
                    way,
                    f"{chosen['recall']:.3f} (from {chosen['low']:.3f})",
                    f"{chosen['p50_ms']:.2f} ms",
                    f"{practice['recall']:.3f} in {practice['p50_ms']:.2f} ms" if practice else "",
                )
            )
    heads = ("filter", "way chosen", "recall, lower bound", "p50", "common practice")
    return ("Filters, on queries that the choice did not see", heads, rows) if rows else None


def slices(shadow: Mapping[str, Any]) -> Table | None:
    """Classes of queries: where the new route wins, where legacy does, and what is to blame."""
    rows = [
        (
            s["slice"],
            s["queries"],
            f"{s['legacy']:.3f}",
            f"{s['route']:.3f}",
            f"{s['low']:+.3f} to {s['high']:+.3f}, p = {s['p_value']:.2g}",
            f"legacy wins: {s['blame']}" if s["difference"] < 0 else "",
        )
        for s in shadow.get("slices") or ()
    ]
    heads = ("queries", "number", "legacy nDCG@10", "route nDCG@10", "difference", "")
    return ("Classes of queries", heads, rows) if rows else None


def backfill(body: Mapping[str, Any]) -> Table | None:
    """How the vectors reached their rows: strategy, HOT share, WAL, pauses, take-overs."""
    if "strategy" not in body:
        return None
    rows: list[tuple[Any, ...]] = [
        ("strategy", body["strategy"]),
        ("updates that touched no index", f"{body['hot_share']:.0%}"),
        (
            "batches, p50 and p95",
            f"{body['batches']}; {body['batch_p50_ms']} and {body['batch_p95_ms']} ms",
        ),
        ("WAL", size(body["wal_bytes"])),
        ("workers, ranges taken over", f"{body['workers']}, {body['windows_taken_over']}"),
        ("pauses", f"{len(body['pauses'])}"),
    ]
    return "The backfill", ("", ""), rows
