"""The pictures of what was measured: recall over selectivity, and over the bytes of an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from runbook_lib.core.pictures import ACCENT, CHOSEN, INK, SOFT, STYLE, as_svg, figure

WIDE_INCHES = (7.6, 3.6)
# Room of a small number, how far it stands from its point, and the plot's sides, all in points and about.
LABEL_POINTS, FIRST_SHIFT, PLOT_POINTS = 12.0, 8.0, 200.0


def rows_by_selectivity(tuning: Mapping[str, Any]) -> str:
    """Rows returned and recall over the share of rows that a filter lets through: chosen way and common practice."""
    classes = [c for c in tuning["classes"] if c["column"]]
    ways = (("common practice", "practice", SOFT, "s"), ("chosen way", "chosen", ACCENT, "o"))
    with matplotlib.rc_context(STYLE):
        drawing, axes = figure()
        for label, which, colour, marker in ways:
            found = sorted((100 * c["share"], 100 * c[which]["recall"], 100 * c[which]["returned"]) for c in classes)
            x = [f[0] for f in found]
            axes.plot(x, [f[2] for f in found], color=colour, marker=marker, markersize=5, linewidth=1.6,
                      label=f"rows, {label}")  # fmt: skip
            axes.plot(x, [f[1] for f in found], color=colour, marker=marker, markersize=5, linewidth=1.2,
                      linestyle=(0, (3, 3)), fillstyle="none", label=f"recall, {label}")  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g} %")
        axes.yaxis.set_major_formatter(lambda value, _position: f"{value:.0f} %")
        axes.set(xlabel="rows that the filter lets through", ylabel="of those that exact search finds")
        axes.set_ylim(-2, 105)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
        return as_svg(drawing, "selectivity")


def bytes_against_recall(compared: Mapping[str, Any]) -> str:
    """Recall@k over an index's bytes a row, a numbered point a way to search, larger where it is slower.

    The ways are named beside the picture, with their p50; today's and the recommended one have colours of their own.
    """
    found = compared["found"]
    slowest = max(float(f["p50_ms"]) for f in found)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=WIDE_INCHES, layout="constrained")
        axes = figure.subplots()
        named: list[Line2D] = []
        for n, (f, shift) in enumerate(zip(found, _shifts(found), strict=True), 1):
            chosen = f["title"] == compared["recommended"]
            colour = CHOSEN if chosen else ACCENT if f["todays"] else SOFT
            x, y = float(f["bytes_a_row"]), float(f["recall"])
            axes.scatter(
                x, y, s=20 + 230 * float(f["p50_ms"]) / slowest, color=colour, alpha=0.7, linewidth=0, clip_on=False
            )
            axes.annotate(str(n), (x, y), xytext=(shift, 0), textcoords="offset points", va="center", fontsize=9)
            said = f"{n}  {f['title']}, {f['p50_ms']:.1f} ms" + (", today's" if f["todays"] else "")
            label = said + (" ✔" if chosen else "")
            named.append(Line2D([], [], marker="o", linestyle="", color=colour, markersize=6, label=label))
        axes.axhline(float(compared["target_recall"]), color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            f"target {compared['target_recall']:g}", (0, float(compared["target_recall"])),
            xycoords=("axes fraction", "data"), xytext=(4, -12), textcoords="offset points", fontsize=9,
        )  # fmt: skip
        axes.set(xlabel="bytes of the index a row", ylabel=f"recall@{compared['k']}")
        axes.set_xlim(0, 1.12 * max(float(f["bytes_a_row"]) for f in found))
        axes.margins(y=0.12)
        axes.set_ylim(top=1.0)
        figure.legend(handles=named, loc="outside right upper", frameon=False, fontsize=9, handletextpad=0.2)
        return as_svg(figure, "storage")


def _shifts(found: Sequence[Mapping[str, Any]]) -> list[float]:
    """How far right of its point each number stands, in points, so that those of near points stand side by side."""
    heights = [float(f["recall"]) for f in found]
    spread = (max(heights) - min(heights)) or 1.0
    widest = max(float(f["bytes_a_row"]) for f in found)
    taken: list[tuple[float, float]] = []
    shifts = []
    for f in found:
        x, y = PLOT_POINTS * float(f["bytes_a_row"]) / widest, PLOT_POINTS * float(f["recall"]) / spread
        shift = FIRST_SHIFT
        while any(abs(x + shift - tx) < LABEL_POINTS and abs(y - ty) < LABEL_POINTS for tx, ty in taken):
            shift += LABEL_POINTS
        taken.append((x + shift, y))
        shifts.append(shift)
    return shifts
