"""How results look in a notebook: plain tables and pictures that read well in the saved record too."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython
from IPython.display import display
from pygments.lexers import PostgresLexer
from pygments.token import Comment, Keyword, Name, Number, String

if TYPE_CHECKING:
    import pandas

# Inline, because a saved notebook and its HTML carry no style sheet of ours.
CELL = "padding:.25em .6em;text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:break-word"
VERDICT = CELL.replace("pre-wrap", "nowrap")
# What a terminal obeys or hides instead of showing it: control characters but line end and tab, marks that turn the
# direction of writing, halves of characters.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
NOTHING = "nothing"
LONG_WORD = re.compile(r"\S{20,}")
MARK = re.compile(r"([/._,(=])")
# A wide table scrolls separately: the arrow keys reach it, and a shadow at its edge shows that there is more. As in
# the record's style sheet, with JupyterLab's colours on a page without ours.
FITS_COLUMNS = 4
_PAGE, _SHADE = "var(--page, var(--jp-layout-color0, transparent))", "var(--bar, #7d8fa2)"
SCROLLER = (
    f"background:linear-gradient({_PAGE},{_PAGE}) left/1.5rem 100% no-repeat local,"
    f"linear-gradient({_PAGE},{_PAGE}) right/1.5rem 100% no-repeat local,"
    f"linear-gradient(to right,{_SHADE},transparent) left/.6rem 100% no-repeat scroll,"
    f"linear-gradient(to left,{_SHADE},transparent) right/.6rem 100% no-repeat scroll;overflow-x:auto"
)
ROW_STYLES = {
    "gate-pass": "border-left:.4em solid #1a7f37",
    "gate-fail": "border-left:.4em solid #b3261e;font-weight:600",
    "gate-unknown": "border-left:.4em solid #9a6700;font-weight:600",
    "gate-not-run": "border-left:.4em solid #6e7781",
    "gate-would-pass": "border-left:.4em dotted #1a7f37",
}

# JupyterLab's colours, which follow its theme; else those of the record's page.
SQL_COLOURS = {
    Keyword: "var(--jp-mirror-editor-keyword-color, var(--sql-keyword, #0550ae))",
    Name.Builtin: "var(--jp-mirror-editor-builtin-color, var(--sql-builtin, #6639ba))",
    String: "var(--jp-mirror-editor-string-color, var(--sql-string, #a31515))",
    Number: "var(--jp-mirror-editor-number-color, var(--sql-number, #0a6640))",
    Comment: "var(--jp-content-font-color2, var(--sql-comment, #59636e))",
}
# Keeps JupyterLab from typesetting what stands between two dollar signs as a formula.
NO_FORMULAS = "mathjax_ignore"


class Amount(str):
    """A formatted figure that keeps its value and unit for :meth:`Table.to_frame`."""

    value: float
    unit: str

    def __new__(cls, text: str, value: float, unit: str = "") -> Amount:
        """unit: of the value, not of the text; empty for counts and scores."""
        made = super().__new__(cls, text)
        made.value, made.unit = value, unit
        return made


def number(value: float) -> Amount:
    """A figure as people read it: thousands apart, three significant digits below a hundred."""
    if isinstance(value, int):
        return Amount(f"{value:,}", value)
    return Amount(f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}", value)


def size(n_bytes: float) -> Amount:
    """Bytes in the unit that keeps the figure short, 1024 to the next."""
    units = ("B", "kB", "MB", "GB", "TB")
    shown, unit = n_bytes, units[0]
    for unit in units:
        if abs(shown) < 1024 or unit == units[-1]:
            break
        shown /= 1024
    return Amount(f"{shown:.0f} {unit}" if shown >= 10 or unit == "B" else f"{shown:.1f} {unit}", n_bytes, "bytes")


def duration(seconds: float) -> Amount:
    """Seconds as milliseconds, seconds, minutes or hours."""
    return Amount(_duration(seconds), seconds, "s")


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def share(of_one: float, digits: int = 0) -> Amount:
    """A share as per cent."""
    return Amount(f"{of_one:.{digits}%}", of_one, "share")


def frame(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> pandas.DataFrame:
    """Rows as a DataFrame: numbers, durations and sizes as numbers, with the unit in the column's title; timestamps
    as timestamps. A column of mixed kinds or units keeps its text.
    """
    # Imported here, because it takes half a second and few kernels need it.
    import pandas

    # Otherwise JupyterLab typesets text between two dollar signs.
    pandas.set_option("display.html.use_mathjax", False)
    _show_wide_frames()
    series = [_typed(name or f"column {i + 1}", [row[i] for row in rows]) for i, name in enumerate(columns)]
    index = pandas.RangeIndex(len(rows))
    return pandas.concat(series, axis=1) if series else pandas.DataFrame(index=index)


def _show_wide_frames() -> None:
    """From here on a wide DataFrame in this kernel scrolls as a wide table does: seen to, and by keyboard."""
    if (shell := get_ipython()) is not None:
        html_of = shell.display_formatter.formatters["text/html"]  # type: ignore[union-attr]
        html_of.for_type_by_name("pandas", "DataFrame", _frame_html)
        html_of.for_type_by_name("pandas.core.frame", "DataFrame", _frame_html)


def _frame_html(of: pandas.DataFrame) -> str:
    made = str(of._repr_html_())  # type: ignore[operator]
    return made if len(of.columns) <= FITS_COLUMNS else scroller(made, "DataFrame")


def frame_of(records: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """Plain data as a DataFrame, one row per record; a nested record becomes columns, ``chosen.recall``."""
    flat = [_flat(record) for record in records]
    columns = list(dict.fromkeys(name for record in flat for name in record))
    return frame(columns, [[record.get(name) for name in columns] for record in flat])


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in record.items():
        inner = _flat(value) if isinstance(value, Mapping) and value else {}
        found |= {f"{name}.{key}": v for key, v in inner.items()} or {name: value}
    return found


def _typed(name: str, values: list[Any]) -> pandas.Series[Any]:
    import pandas

    there = [v for v in values if v is not None and v != ""]
    units = {v.unit if isinstance(v, Amount) else "" for v in there}
    is_number = [isinstance(v, Amount | int | float | Decimal) and not isinstance(v, bool) for v in there]
    if there and all(is_number) and len(units) == 1:
        bare = [_bare(v) for v in values]
        unit = units.pop()
        return pandas.Series(bare, name=name if unit in name else f"{name} ({unit})")
    if there and all(isinstance(v, datetime) for v in there):
        aware = all(v.tzinfo is not None for v in there)
        return pandas.Series(pandas.to_datetime(pandas.Series(values, dtype=object), utc=aware), name=name)
    return pandas.Series([str(v) if isinstance(v, Amount) else v for v in values], name=name)


def _bare(value: Any) -> Any:
    """The number behind a figure. Decimals become floats, as in pandas.read_sql, since few methods take Decimals."""
    if isinstance(value, Amount):
        return value.value
    return None if value is None or value == "" else float(value) if isinstance(value, Decimal) else value


def some(names: Sequence[object], most: int, between: str = ", ") -> str:
    """The first of many, and how many more there are: ``a, b, c and 4 more``."""
    more = f" and {number(len(names) - most)} more" if len(names) > most else ""
    return between.join(map(str, names[:most])) + more


def plain(text: str) -> str:
    """A text from data as a terminal may get it: what it would obey is spelt out, ``\\x1b`` for an escape."""
    return OBEYED.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 0x80 else f"\\u{ord(m[0]):04x}", text)


def one_line(text: str) -> str:
    """A text that must not pass for several lines."""
    return text.replace("\n", "\\n")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S %Z}".rstrip()
    return str(value)


def _markup(value: Any) -> str:
    """The value as HTML; a long path or name may break behind its marks, a word never does."""
    escaped = html.escape(_text(value))
    return LONG_WORD.sub(lambda word: MARK.sub(r"\1<wbr>", word[0]), escaped)


@dataclass(frozen=True)
class Table:
    """Rows under column titles, or the word nothing; text in a terminal, HTML in a notebook. Values are escaped."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    row_classes: Sequence[str] = field(default_factory=tuple)

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]], caption: str = "") -> Table:
        """A table of dictionaries that share their keys."""
        rows = list(records)
        columns = list(rows[0]) if rows else [""]
        return cls(columns, [[row[c] for c in columns] for row in rows], caption)

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a DataFrame, as :func:`frame` makes it."""
        return frame([str(c) for c in self.columns], self.rows)

    def __str__(self) -> str:
        cells = [list(self.columns), *[[one_line(_text(v)) for v in row] for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join(([self.caption] if self.caption else []) + lines + ([] if self.rows else [NOTHING]))

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """The text that goes with the HTML, for a terminal, a diff or a reader without HTML."""
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
        if not body:
            body = [f'<tr><td colspan="{len(self.columns)}" style="{CELL}">{NOTHING}</td></tr>']
        caption = f'<caption style="text-align:left">{html.escape(self.caption)}</caption>' if self.caption else ""
        table = (
            f'<table class="{NO_FORMULAS}" style="border-collapse:collapse">{caption}'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        )
        return table if len(self.columns) <= FITS_COLUMNS else scroller(table, self.caption or "Table")


def scroller(table: str, label: str) -> str:
    """The HTML of a table, which scrolls separately if it does not fit."""
    about = f'tabindex="0" role="region" aria-label="{html.escape(label)}"'
    return f'<div class="scroll" {about} style="{SCROLLER}">{table}</div>'


class LiveLine:
    """One line of a notebook's output that is replaced in place, so that a record keeps only its last state.

    Outside a kernel, where nothing can be replaced, it shows nothing.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str) -> None:
        """Puts this text in the place of the former one."""
        shell = get_ipython()
        if shell is None or not hasattr(shell, "kernel"):
            return
        shown = {"text/plain": text}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(shown, raw=True)


def sql_html(text: str) -> str:
    """SQL in one block: monospaced, wrapped, coloured, and never read as a formula."""
    parts = []
    for kind, value in PostgresLexer(stripnl=False, ensurenl=False).get_tokens(text):
        colour = next((c for token, c in SQL_COLOURS.items() if kind in token), "")
        escaped = html.escape(value)
        parts.append(f'<span style="color:{colour}">{escaped}</span>' if colour else escaped)
    style = "white-space:pre-wrap;overflow-wrap:anywhere;word-break:normal;margin:.3em 0;font-family:monospace"
    return f'<pre class="{NO_FORMULAS}" style="{style}"><code>{"".join(parts)}</code></pre>'


def statement_html(number_: int, what: str, facts: Sequence[tuple[str, str]], text: str) -> str:
    """One statement as a block of its own: what it does, its facts on a line (lock, undo), then the SQL."""
    said = " · ".join(f"<strong>{html.escape(name)}</strong> {html.escape(value)}" for name, value in facts if value)
    return (
        f'<div class="{NO_FORMULAS}" style="margin:0 0 1em;text-align:left">'
        f"<div><strong>{number_}. {html.escape(what)}</strong></div><div>{said}</div>{sql_html(text)}</div>"
    )
