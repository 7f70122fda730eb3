"""A statement with a vector search in it: where the search stands, and the same statement with one thing changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from runbook_lib.params import placeholders

# What must not be read as SQL: strings, quoted names, dollar quotes, comments.
OPAQUE = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|(\$\w*\$).*?\1|--[^\n]*|/\*.*?\*/", re.S)
SYMBOL = r"(?:<=>|<->|<#>|<\+>|<~>)"
# As it is found in a masked text, where a quoted schema is a word like any other.
DISTANCE = re.compile(rf"\bOPERATOR\s*\(\s*[\w$]+\s*\.\s*{SYMBOL}\s*\)|{SYMBOL}", re.I)
ORDER_BY = re.compile(r"\bORDER\s+BY\b", re.I)
END_OF_ORDER = re.compile(r"\b(?:LIMIT|OFFSET|FETCH|FOR|UNION|INTERSECT|EXCEPT)\b|;", re.I)
DIRECTION = re.compile(r"\s+(?:ASC|DESC)\b|\s+NULLS\s+(?:FIRST|LAST)\b", re.I)
CAST = r"(?:::\s*{type}|\bAS\s+{type})(?!\s*\(|\w)"


def bound(text: str, names: Sequence[str]) -> tuple[str, list[str]]:
    """``:name`` as $1, $2, … in the order in which they first occur; returns the text and the names that occur."""
    pieces = placeholders.split(text.strip().rstrip(";"), names)
    used = list(dict.fromkeys(piece for is_name, piece in pieces if is_name))
    return "".join(f"${used.index(piece) + 1}" if is_name else piece for is_name, piece in pieces), used


def named(text: str, names: Sequence[str]) -> str:
    """$1, $2, … as the names that :func:`bound` found, for a person to read."""
    return re.sub(
        r"\$(\d+)\b", lambda m: placeholders.written(names[int(m[1]) - 1]) if int(m[1]) <= len(names) else m[0], text
    )


@dataclass(frozen=True)
class VectorSearch:
    """The ORDER BY of a vector search inside a statement.

    start, end: of its sort keys in the text. left, operator, right: of the distance that it sorts by.
    """

    text: str
    start: int
    end: int
    left: str
    operator: str
    right: str

    @property
    def keys(self) -> str:
        """The sort keys as they are written."""
        return self.text[self.start : self.end].strip()

    def ordered_by(self, keys: str) -> str:
        """The statement with other sort keys."""
        tail = self.text[self.end :]
        return f"{self.text[: self.start].rstrip()} {keys}{' ' if tail[:1].isalpha() else ''}{tail}"

    def without(self, pattern: str) -> str:
        """The statement with a word less in its sort keys."""
        return self.ordered_by(_tidy(re.sub(pattern, "", self.text[self.start : self.end], flags=re.I)))

    def bare(self, left: str = "", symbol: str = "", right: str = "") -> str:
        """The statement sorted by the distance alone, ascending, with other operands or distance where given."""
        return self.ordered_by(f"{left or self.left} {self._as_here(symbol)} {right or self.right}\n")

    def with_distance(self, symbol: str) -> str:
        """The statement with another distance, wherever it stands in the sort keys."""
        return self.ordered_by(_tidy(self.text[self.start : self.end].replace(self.operator, self._as_here(symbol))))

    def _as_here(self, symbol: str) -> str:
        """The operator with another symbol, in the schema that it is written with."""
        return re.sub(SYMBOL + r"(?=\s*\)?$)", symbol, self.operator) if symbol else self.operator

    def limited(self, limit: str) -> str:
        """The statement with a LIMIT behind its ORDER BY."""
        return f"{self.text[: self.end].rstrip()}\nLIMIT {limit}{self.text[self.end :]}"

    def filtered(self, predicate: str) -> str:
        """The statement with one more condition in the WHERE clause before its ORDER BY."""
        hidden = mask(self.text)
        order = [m.start() for m in ORDER_BY.finditer(hidden) if m.end() <= self.start][-1]
        level = _depth(hidden, order)
        wheres = [m for m in re.finditer(r"\bWHERE\b", hidden[:order], re.I) if _depth(hidden, m.start()) == level]
        if wheres:
            at = wheres[-1].end()
            return f"{self.text[:at]} ({predicate}) AND{self.text[at:]}"
        return f"{self.text[:order]}WHERE {predicate}\n{self.text[order:]}"


def find(text: str) -> VectorSearch | None:
    """The first ORDER BY whose keys hold a distance, or an alias of one; None where there is none."""
    hidden = mask(text)
    for match in ORDER_BY.finditer(hidden):
        start, end = match.end(), _end_of_order(hidden, match.end(), _depth(hidden, match.start()))
        if operator := DISTANCE.search(hidden, start, end):
            return VectorSearch(text, start, end, *_distance(text, hidden, operator, start, end))
        if found := _through_alias(text, hidden, start, end):
            return found
    return None


def mask(text: str) -> str:
    """The text with blanks for everything that is not SQL itself; positions stay."""
    return OPAQUE.sub(lambda m: " " * len(m[0]) if m[0][0] != '"' else "x" * len(m[0]), text)


def casts_without_dimension(side: str, kind: str) -> re.Match[str] | None:
    """``::halfvec`` or ``CAST(… AS halfvec)`` where no dimension follows."""
    return re.search(CAST.format(type=kind), side, re.I)


def _tidy(keys: str) -> str:
    return f"{keys.strip()}\n"


def _depth(hidden: str, at: int) -> int:
    before = hidden[:at]
    return sum(before.count(c) for c in "([") - sum(before.count(c) for c in ")]")


def _end_of_order(hidden: str, start: int, level: int) -> int:
    ends = [m.start() for m in END_OF_ORDER.finditer(hidden, start) if _depth(hidden, m.start()) == level]
    closing = (i for i in range(start, len(hidden)) if hidden[i] == ")" and _depth(hidden, i + 1) < level)
    return min([*ends, next(closing, len(hidden)), len(hidden)])


def _distance(text: str, hidden: str, operator: re.Match[str], start: int, end: int) -> tuple[str, str, str]:
    """The operator and what is on both sides of it, up to the bracket, comma or word that ends it: left, operator,
    right. operator: as it was found in the masked text, which hides what a quoted schema is called.
    """
    level = _depth(hidden, operator.start())
    left = operator.start()
    while left > start and not (
        (hidden[left - 1] in "([" and _depth(hidden, left - 1) < level)
        or (hidden[left - 1] == "," and _depth(hidden, left - 1) == level)
    ):
        left -= 1
    right = operator.end()
    while right < end and not (
        (hidden[right] in ")]" and _depth(hidden, right + 1) < level)
        or (hidden[right] == "," and _depth(hidden, right) == level)
        or DIRECTION.match(hidden, right)
        or re.match(r"\s(?:AS|FROM)\b", hidden[right:], re.I)
    ):
        right += 1
    before, after = text[left : operator.start()].strip(), text[operator.end() : right].strip()
    return before, text[operator.start() : operator.end()], after


def _through_alias(text: str, hidden: str, start: int, end: int) -> VectorSearch | None:
    """``SELECT a <=> b AS distance … ORDER BY distance``: the distance is the one behind the alias."""
    word = re.match(r'\s*("?\w+"?)', text[start:end])
    if not word:
        return None
    alias = re.compile(r"\bAS\s+" + re.escape(word[1]) + r"(?!\w)", re.I)
    for match in alias.finditer(text, 0, start):
        level = _depth(hidden, match.start())
        heads = [m.end() for m in re.finditer(r"\bSELECT\b|,", hidden[: match.start()], re.I)]
        head = max((h for h in heads if _depth(hidden, h) == level), default=0)
        if operator := DISTANCE.search(hidden, head, match.start()):
            return VectorSearch(text, start, end, *_distance(text, hidden, operator, head, match.start()))
    return None
