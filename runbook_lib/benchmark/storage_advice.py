"""What a comparison of storages comes to: one table, one picture, one sentence."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runbook_lib.benchmark import relevance_measures
from runbook_lib.core.display import Table, duration, number, size
from runbook_lib.core.thresholds import apart, at_least, score
from runbook_lib.params import Params

# To go over to another storage is worth a build where it saves this share of the bytes, at least.
LEAST_SAVING = 0.2
# Much slower than today's and the users would notice; below so many ms nobody does.
MOST_TIMES_SLOWER, UNNOTICED_MS = 1.5, 5.0
# A difference in nDCG@10 that comes out this often when there is none is no loss.
P_VALUE = 0.05


@dataclass(frozen=True)
class Comparison:
    """Every way to search, with its figures, as the ledger keeps them.

    found: one row a way; ``reaches`` says whether the target is reached with no query short of rows.
    """

    facts: dict[str, Any]
    found: tuple[dict[str, Any], ...]
    recommended: str | None
    recommendation: str

    @classmethod
    def of(cls, params: Params, found: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Comparison:
        """Judges the rows and chooses among them."""
        target = params.tune.target_recall
        rows = [r | {"reaches": at_least(r["recall"], target) and not r["short"]} for r in found]
        today = next((r for r in rows if r["todays"]), None)
        rows = [r | {"worse": _loses_relevance(params, today, r)} for r in rows]
        chosen = _choose([r for r in rows if r["method"] == params.index.method], today)
        facts = {"k": params.queries.k, "target_recall": target, "where": params.storage.where} | facts
        return cls(facts, tuple(rows), _key(chosen), _sentence(facts, chosen, today, rows))

    def as_data(self) -> dict[str, Any]:
        """For the ledger: single queries' measures stay out."""
        rows = [{k: v for k, v in r.items() if k != "per_query"} for r in self.found]
        return {**self.facts, "found": rows, "recommended": self.recommended, "recommendation": self.recommendation}

    def table(self) -> Table:
        """One row a way to search, today's first, exact search last."""
        f = self.facts
        heads = (
            "the index holds", "bytes", "a row", "whole table", "build", "setting", f"recall@{f['k']}", "p50", "p95",
            "nDCG@10", "",
        )  # fmt: skip
        exact = (
            "nothing: exact search",
            *[""] * 5,
            "1.000",
            f"{f['exact_p50_ms']:.2f} ms",
            "",
            _ndcg(f["exact_ndcg"]),
            "",
        )
        caption = (
            f"On {number(f['rows'])} rows, {f['queries']} queries; nDCG@10 on {f['judged']} judged queries; each at"
            f" the smallest setting that reaches recall {f['target_recall']:g}; whole table:"
            f" {number(f['whole_rows'])} rows"
        )
        return Table(heads, [*map(self._row, self.found), exact], caption)

    def _row(self, r: dict[str, Any]) -> tuple[Any, ...]:
        said = "today's" if r["todays"] else ""
        if not r["reaches"]:
            said = "misses the target"
        elif r["worse"]:
            said = "loses relevance"
        elif _key(r) == self.recommended:
            said = "recommended" + (", as today" if r["todays"] else "")
        setting = f"{'ef_search' if r['method'] == 'hnsw' else 'probes'} {r['setting']}"
        return (
            r["title"], size(r["bytes"]), number(r["bytes_a_row"]), size(r["whole_bytes"]),
            "" if r["build_s"] is None else duration(r["build_s"]), setting, f"{r['recall']:.3f}",
            f"{r['p50_ms']:.2f} ms", f"{r['p95_ms']:.2f} ms", _ndcg(r["ndcg"]), said,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.table()}\n{self.recommendation}"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        # Here, because matplotlib takes longer to import than most phases take to run.
        from runbook_lib.core import pictures

        drawn = [pictures.bytes_against_recall(self.as_data())] if self.found else []
        advice = f"<p><strong>{html.escape(self.recommendation)}</strong></p>"
        return self.table()._repr_html_() + advice + pictures.in_a_notebook(drawn)


def _ndcg(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _key(row: dict[str, Any] | None) -> str | None:
    return row["title"] if row else None


def _loses_relevance(params: Params, today: dict[str, Any] | None, row: dict[str, Any]) -> bool:
    """By more than the parameters allow, and by more than chance would."""
    if today is None or row is today or not row["per_query"]:
        return False
    pair = relevance_measures.paired(today["per_query"], row["per_query"])
    return pair.difference < -params.cut_over.largest_relevance_loss and pair.p_value < P_VALUE


def _choose(rows: Sequence[dict[str, Any]], today: dict[str, Any] | None) -> dict[str, Any] | None:
    """The smallest index that ``index.storage`` knows, reaches the target, keeps relevance and is fast enough.

    Another method is no matter of storage: IVFFlat's lists age, which one look does not show.
    """
    fit = [r for r in rows if r["reaches"] and not r["worse"] and r["held"] != "first" and r["uses_its_index"]]
    if today is None or not today["reaches"]:
        return min(fit, key=lambda r: (r["bytes"], r["p50_ms"]), default=None)
    slowest = max(MOST_TIMES_SLOWER * today["p95_ms"], UNNOTICED_MS)
    fit = [r for r in fit if r["p95_ms"] <= slowest and r["bytes"] <= (1 - LEAST_SAVING) * today["bytes"]]
    # Among depths of one index the shallowest that reaches the target is the fastest.
    return min(fit, key=lambda r: (r["bytes"], r["p50_ms"]), default=today)


def _sentence(
    facts: dict[str, Any], chosen: dict[str, Any] | None, today: dict[str, Any] | None, rows: Sequence[dict[str, Any]]
) -> str:
    if chosen is None:
        best = max(rows, key=lambda r: r["recall"], default=None)
        recall, target = apart(best["recall"] if best else 0.0, facts["target_recall"], score)
        found = f"; {best['title']} comes nearest, with {recall}" if best else ""
        return f"Nothing reaches recall {target}{found}."
    figures = _figures(chosen)
    if chosen is today:
        return f"Keep what the index holds today: {figures}; nothing smaller does as well."
    setting = f"index.storage: {chosen['held']}" + (
        f", index.rerank: {chosen['rerank']}" if chosen["rerank"] > 1 else ""
    )
    if today is None:
        return f"Set {setting}: {figures}."
    return (
        f"Set {setting}: {figures}, {chosen['bytes'] / today['bytes']:.0%} of today's index;"
        f" today's has {_figures(today)}."
    )


def _figures(row: dict[str, Any]) -> str:
    ndcg = f", nDCG@10 {row['ndcg']:.3f}" if row["ndcg"] is not None else ""
    return (
        f"{size(row['whole_bytes'])} for the whole table, recall {row['recall']:.3f}, p50 {row['p50_ms']:.2f} ms,"
        f" p95 {row['p95_ms']:.2f} ms{ndcg}"
    )
