"""How results look in a notebook: plain tables and pictures that read well in the saved record too."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

# Inline, because a saved notebook and its HTML carry no style sheet of ours.
CELL = "padding:.25em .6em;text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:break-word"
VERDICT = CELL.replace("pre-wrap", "nowrap")
LONG_WORD = re.compile(r"\S{30,}")
MARK = re.compile(r"([/._,(])")
ROW_STYLES = {
    "gate-pass": "border-left:.4em solid #1a7f37",
    "gate-fail": "border-left:.4em solid #b3261e;font-weight:600",
    "gate-unknown": "border-left:.4em solid #9a6700;font-weight:600",
    "gate-not-run": "border-left:.4em solid #6e7781",
}


def number(value: float) -> str:
    """A figure as people read it: thousands apart, three significant digits below a hundred."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(n_bytes: float) -> str:
    """Bytes in the unit that keeps the figure short, 1024 to the next."""
    units = ("B", "kB", "MB", "GB", "TB")
    for unit in units:
        if abs(n_bytes) < 1024 or unit == units[-1]:
            return f"{n_bytes:.0f} {unit}" if n_bytes >= 10 or unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return ""


def duration(seconds: float) -> str:
    """Seconds as milliseconds, seconds, minutes or hours."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    return str(value)


def _markup(value: Any) -> str:
    """The value as HTML; a long path or name may break behind its marks, a word never does."""
    escaped = html.escape(_text(value))
    return LONG_WORD.sub(lambda word: MARK.sub(r"\1<wbr>", word[0]), escaped)


@dataclass(frozen=True)
class Table:
    """Rows under column titles; text in a terminal, HTML in a notebook. Values are escaped."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    row_classes: Sequence[str] = field(default_factory=tuple)

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]], caption: str = "") -> Table:
        """A table of dictionaries that share their keys."""
        rows = list(records)
        columns = list(rows[0]) if rows else ["nothing"]
        return cls(columns, [[row[c] for c in columns] for row in rows], caption)

    def __str__(self) -> str:
        cells = [list(self.columns), *[[_text(v) for v in row] for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join(([self.caption] if self.caption else []) + lines)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """The text beside the HTML, for a terminal, a diff or a reader without HTML."""
        printer.text(str(self))

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col" style="{CELL}">{html.escape(str(c))}</th>' for c in self.columns)
        body = []
        for i, row in enumerate(self.rows):
            kind = self.row_classes[i] if self.row_classes else ""
            style = f' class="{kind}" style="{ROW_STYLES.get(kind, "")}"' if kind else ""
            cells = "".join(
                f'<td style="{VERDICT if kind and not j else CELL}">{_markup(v)}</td>' for j, v in enumerate(row)
            )
            body.append(f"<tr{style}>{cells}</tr>")
        caption = f'<caption style="text-align:left">{html.escape(self.caption)}</caption>' if self.caption else ""
        return (
            f'<table style="border-collapse:collapse">{caption}'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        )
