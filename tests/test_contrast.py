"""Colours of text against what is behind them, worked out from the record's style sheet: WCAG 2.2, AA."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from pygments.style import StyleMeta
from pygments.styles import get_style_by_name
from pygments.token import Whitespace

from runbook_lib.core import display, pictures
from runbook_lib.runner import record

STYLE = (Path(record.__file__).parent / "templates" / "style.css").read_text()
TEXT, GRAPHIC = 4.5, 3.0


def scheme(name: str) -> dict[str, str]:
    """The colours of the style sheet by their variable."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", r)) for r in re.findall(r":root \{(.*?)\}", STYLE, re.S)
    )
    return light | (dark if name == "dark" else {})


def luminance(colour: str) -> float:
    digits = colour.removeprefix("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_by_hand() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#fff", "#fff") == 1
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01), "the grey that just fails"


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_can_be_read_on_whatever_it_stands_on(name: str) -> None:
    colours = scheme(name)
    grounds = [g for g in colours if g in ("page", "panel") or g.endswith("-tint")]
    texts = ["ink", "quiet", "accent", "pass", "fail", "warn", *(c for c in colours if c.startswith("sql-"))]
    assert (len(grounds), len(texts)) == (6, 11)
    faint = {
        f"{t} on {g}": round(contrast(colours[t], colours[g]), 2)
        for t, g in product(texts, grounds)
        if contrast(colours[t], colours[g]) < TEXT
    }
    assert faint == {}


@pytest.mark.parametrize("name", ["light", "dark"])
def test_bars_and_lines_of_pictures_can_be_seen(name: str) -> None:
    colours = scheme(name)
    used = set(re.findall(r"var\(--(\w+)", " ".join(pictures.AS_CSS.values()))) - {"line"}
    assert used == {"ink", "accent", "bar", "pass"}
    assert {
        c: round(contrast(colours[c], colours["page"]), 2)
        for c in used
        if contrast(colours[c], colours["page"]) < GRAPHIC
    } == {}


@pytest.mark.parametrize(("name", "style"), [("light", record.CODE_LIGHT), ("dark", record.CODE_DARK)])
def test_code_cells_can_be_read(name: str, style: str) -> None:
    panel, found = scheme(name)["panel"], get_style_by_name(style)
    assert isinstance(found, StyleMeta)
    colours = {f"#{look['color']}" for kind, look in found if look["color"] and kind not in Whitespace}
    assert colours and {c: round(contrast(c, panel), 2) for c in colours if contrast(c, panel) < TEXT} == {}


def test_the_colours_of_a_notebook_without_the_page_are_those_of_the_light_scheme() -> None:
    light = scheme("light")
    for colour in display.SQL_COLOURS.values():
        variable, fallback = re.findall(r"var\(--(sql-\w+), (#\w+)\)", colour)[0]
        assert light[variable] == fallback
