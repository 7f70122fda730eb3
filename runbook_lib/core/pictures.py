"""The pictures of a record: SVG with real text, in the colours of the page that they stand in."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from runbook_lib.core.display import number

# Placeholders that become CSS: a picture then follows the page into dark mode and onto paper.
INK, LINE, ACCENT, SOFT, CHOSEN = "#010101", "#020202", "#030303", "#040404", "#050505"
# The second value stands where the page has none of the variables: in a notebook.
AS_CSS = {
    INK: "var(--ink, currentColor)",
    LINE: "var(--line, #8885)",
    ACCENT: "var(--accent, #2f7fd1)",
    SOFT: "var(--bar, #9aa9b8)",
    CHOSEN: "var(--pass, #2c9a4b)",
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "grid.color": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}
SIZE_INCHES = (5.4, 3.3)
WIDE_INCHES = (7.6, 3.6)
# Room of a small number, how far it stands from its point, and the plot's sides, all in points and about.
LABEL_POINTS, FIRST_SHIFT, PLOT_POINTS = 12.0, 8.0, 200.0


def recall_against_latency(tuning: Mapping[str, Any]) -> str:
    """Recall@k over p50 in ms, a point a setting, the chosen one marked, with the target and exact search."""
    points = sorted(tuning["points"], key=lambda p: float(p["value"]))
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        x, y = [float(p["p50_ms"]) for p in points], [float(p["recall"]) for p in points]
        # Recall ends at 1: a point there is drawn whole, over the axis.
        axes.plot(x, y, color=ACCENT, marker="o", markersize=5, linewidth=1.6, clip_on=False)
        axes.axhline(float(tuning["target_recall"]), color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            f"target {tuning['target_recall']:g}",
            (1, float(tuning["target_recall"])),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
        )
        for point in points:
            chosen = is_chosen(tuning, point)
            if chosen:
                axes.plot(
                    point["p50_ms"],
                    point["recall"],
                    "o",
                    color=CHOSEN,
                    markersize=12,
                    fillstyle="none",
                    mew=2.2,
                    clip_on=False,
                )
            axes.annotate(
                f"{point['value']}" + (" ✔ chosen" if chosen else ""),
                (float(point["p50_ms"]), float(point["recall"])),
                xytext=(8, -13),
                textcoords="offset points",
                fontweight="bold" if chosen else "normal",
            )
        axes.set(xlabel="latency p50, ms", ylabel=f"recall@{tuning['k']}")
        axes.set_ylim(min([*y, float(tuning["target_recall"])]) - 0.03, 1.0)
        axes.margins(x=0.14)
        return _svg(figure, "recall")


def rows_by_selectivity(tuning: Mapping[str, Any]) -> str:
    """Rows returned and recall over the share of rows that a filter lets through: chosen way and common practice."""
    classes = [c for c in tuning["classes"] if c["column"]]
    ways = (("common practice", "practice", SOFT, "s"), ("chosen way", "chosen", ACCENT, "o"))
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
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
        return _svg(figure, "selectivity")


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
        return _svg(figure, "storage")


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


def in_a_notebook(drawn: Sequence[str]) -> str:
    """Pictures side by side for a notebook's output, where nothing else limits their width."""
    shown = "".join(f'<div style="flex:1 1 24rem;max-width:34rem">{svg}</div>' for svg in drawn)
    return f'<div style="display:flex;flex-wrap:wrap;gap:1.5rem">{shown}</div>'


def is_chosen(tuning: Mapping[str, Any], point: Mapping[str, Any]) -> bool:
    """Is this the chosen point? ``chosen`` may be its value or the whole point."""
    chosen = tuning.get("chosen")
    return chosen == point["value"] or (isinstance(chosen, Mapping) and chosen.get("value") == point["value"])


def bars(labels: Sequence[str], values: Sequence[float], what: str, best: int | None) -> str:
    """Horizontal bars with their figures, the best one in the accent colour."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(height=0.75 + 0.5 * len(labels))
        colours = [ACCENT if i == best else SOFT for i in range(len(labels))]
        drawn = axes.barh(range(len(labels)), values, color=colours, height=0.62)
        weights = ["bold" if i == best else "normal" for i in range(len(labels))]
        for text, weight in zip(
            axes.bar_label(drawn, [_figure_text(v) for v in values], padding=5), weights, strict=True
        ):
            text.set_fontweight(weight)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, (max(values) or 1) * 1.16)
        axes.set_xlabel(what)
        return _svg(figure, what)


def progress(samples: Sequence[Sequence[float]], total: float | None) -> str:
    """Rows over seconds, up to the total."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        x, y = [float(s[0]) for s in samples], [float(s[1]) for s in samples]
        axes.plot(x, y, color=ACCENT, linewidth=2)
        axes.fill_between(x, y, color=ACCENT, alpha=0.12, linewidth=0)
        if total:
            axes.axhline(total, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.annotate(
                f"{number(total)} rows", (0, total), xycoords=("axes fraction", "data"),
                xytext=(4, -14), textcoords="offset points",
            )  # fmt: skip
        axes.set(xlabel="seconds", ylabel="rows in the table")
        axes.set_ylim(0, max([*y, total or 0, 1]) * 1.06)
        axes.set_xlim(0, max([*x, 0.001]))
        axes.yaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
        return _svg(figure, "progress")


def _figure(height: float = SIZE_INCHES[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE_INCHES[0], height), layout="constrained")
    return figure, figure.subplots()


def _figure_text(value: float) -> str:
    return f"{value:.3f}" if value < 1 else number(float(value))


def _svg(figure: Figure, salt: str) -> str:
    """The picture to be put into a page: no prolog, no ids that would clash, colours from the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    prefix = re.sub(r"\W", "", salt)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", text)
    for placeholder, css in AS_CSS.items():
        text = text.replace(placeholder, css)
    # The page gives the width; a style sheet in here would reach the whole page.
    text = re.sub(
        r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1 style='max-width:34rem' aria-hidden='true'>", text, count=1
    )
    return re.sub(r"<style.*?</style>", "", text, flags=re.S).strip()
