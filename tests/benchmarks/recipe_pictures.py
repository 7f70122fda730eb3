"""Draws what bench_recipe saved: how long each step took, and how long a writer waited for it at most.

python -m tests.benchmarks.recipe_pictures FOLDER FILE.json [...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# What a writer should wait at most.
LONGEST_WAIT_S = 0.5
SHADES = (
    "#4c78a8",
    "#f58518",
    "#54a24b",
    "#e45756",
    "#72b7b2",
    "#b279a2",
    "#9d755d",
    "#bab0ac",
    "#eeca3b",
    "#ff9da6",
)


def longest_waits(arm: dict[str, Any]) -> list[tuple[str, float]]:
    """Name of each phase, and the longest wait of a write that began beside it, in seconds."""
    found = []
    for name, began, end in arm["phases"]:
        during = [w["ms"] for w in arm["waits"] if w["kind"] != "read" and began <= w["began"] <= end]
        if during and not name.startswith("("):
            found.append((name, max(during) / 1000))
    return found


def draw_waits(arms: list[dict[str, Any]]) -> Figure:
    """A bar a phase of each arm, on a logarithmic scale, and the promise as a line."""
    figure = Figure(figsize=(8, 0.24 * sum(len(longest_waits(a)) for a in arms) + 1.2), layout="constrained")
    axes, place, ticks = figure.subplots(), 0.0, list[tuple[float, str]]()
    for arm, shade in zip(arms, SHADES, strict=False):
        for name, seconds in longest_waits(arm):
            axes.barh(place, seconds, color=shade)
            axes.text(seconds * 1.05, place, f"{seconds:,.2f} s", va="center", fontsize=7)
            ticks.append((place, f"{arm['name']}: {name}"))
            place -= 1
        place -= 0.6
    axes.axvline(LONGEST_WAIT_S, color="black", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.margins(x=0.15, y=0.01)
    axes.set_xlabel("longest wait of a writer, s; the line is 0.5 s")
    return figure


def draw_minutes(arms: list[dict[str, Any]]) -> Figure:
    """A bar an arm, in parts by phase."""
    figure = Figure(figsize=(8, 0.8 * len(arms) + 1.6), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        left = 0.0
        for (name, began, end), shade in zip(arm["phases"], SHADES * 2, strict=False):
            minutes = (end - began) / 60
            axes.barh(-place, minutes, left=left, color=shade, edgecolor="white")
            if minutes > 0.06 * max(sum(e - b for _, b, e in a["phases"]) / 60 for a in arms):
                label = name.removeprefix("(").removesuffix(")").replace("_", " ").replace(" ", "\n", 1)
                axes.text(left + minutes / 2, -place, label, ha="center", va="center", fontsize=6)
            left += minutes
    axes.set_yticks([-i for i in range(len(arms))], [a["name"] for a in arms])
    axes.set_xlabel("minutes")
    return figure


def main() -> None:
    """Writes both pictures into the folder."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("files", type=Path, nargs="+")
    options = arguments.parse_args()
    arms = [arm for path in options.files for arm in json.loads(path.read_text())]
    for name, figure in (("recipe_waits", draw_waits(arms)), ("recipe_minutes", draw_minutes(arms))):
        figure.savefig(options.folder / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
