"""The pictures of a record that no notebook shows: bars of figures, and the progress of a backfill."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

from runbook_lib.core.display import number
from runbook_lib.core.pictures import ACCENT, INK, SOFT, STYLE, as_svg, figure


def bars(labels: Sequence[str], values: Sequence[float], what: str, best: int | None) -> str:
    """Horizontal bars with their figures, the best one in the accent colour."""
    with matplotlib.rc_context(STYLE):
        drawing, axes = figure(height=0.75 + 0.5 * len(labels))
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
        return as_svg(drawing, what)


def progress(samples: Sequence[Sequence[float]], total: float | None) -> str:
    """Rows over seconds, up to the total."""
    with matplotlib.rc_context(STYLE):
        drawing, axes = figure()
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
        return as_svg(drawing, "progress")


def _figure_text(value: float) -> str:
    return f"{value:.3f}" if value < 1 else number(float(value))
