"""The pictures of a record: SVG with real text, in the colours of the page that they stand in."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Placeholders that become CSS: a picture then follows the page into dark mode and onto paper.
INK, LINE, ACCENT, SOFT, CHOSEN = "#010101", "#020202", "#030303", "#040404", "#050505"
# The second value stands where the page has none of the variables: in a notebook.
AS_CSS = {
    INK: "var(--ink, currentColor)",
    LINE: "var(--line, #8885)",
    ACCENT: "var(--accent, #2f7fd1)",
    SOFT: "var(--bar, #7d8fa2)",
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
SIZE_INCHES = (5.4, 2.9)


def recall_against_latency(tuning: Mapping[str, Any]) -> str:
    """Recall@k over p50 in ms, a point a setting, the chosen one marked, with the target and exact search."""
    points = sorted(tuning["points"], key=lambda p: float(p["value"]))
    with matplotlib.rc_context(STYLE):
        drawing, axes = figure()
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
                # Above its point, since its neighbours may be close, and theirs are below.
                xytext=(8, 7 if chosen else -13),
                textcoords="offset points",
                fontweight="bold" if chosen else "normal",
            )
        axes.set(xlabel="latency p50, ms", ylabel=f"recall@{tuning['k']}")
        axes.set_ylim(min([*y, float(tuning["target_recall"])]) - 0.03, 1.0)
        axes.margins(x=0.14)
        return as_svg(drawing, "recall")


def in_a_notebook(drawn: Sequence[str]) -> str:
    """Pictures side by side for a notebook's output, where nothing else limits their width."""
    shown = "".join(f'<div style="flex:1 1 24rem;max-width:34rem">{svg}</div>' for svg in drawn)
    return f'<div style="display:flex;flex-wrap:wrap;gap:1.5rem">{shown}</div>'


def is_chosen(tuning: Mapping[str, Any], point: Mapping[str, Any]) -> bool:
    """Is this the chosen point? ``chosen`` may be its value or the whole point."""
    chosen = tuning.get("chosen")
    return chosen == point["value"] or (isinstance(chosen, Mapping) and chosen.get("value") == point["value"])


def figure(height: float = SIZE_INCHES[1]) -> tuple[Figure, Axes]:
    """An empty picture of the usual width, and where to draw in it."""
    drawing = Figure(figsize=(SIZE_INCHES[0], height), layout="constrained")
    return drawing, drawing.subplots()


def as_svg(figure: Figure, salt: str) -> str:
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
