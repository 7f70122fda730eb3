"""``:name`` and ``:"any name"`` in a statement, as psql spells its variables: found, and written."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What is not SQL: strings, dollar quotes, comments; and quoted names, where no placeholder begins.
OPAQUE = r"""[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|(?P<dollar>\$\w*\$).*?(?P=dollar)|--[^\n]*|/\*.*?\*/"""
QUOTED_NAME = r'"(?:[^"]|"")*"'
PLAIN = r"(?<![:\w]):(?P<plain>[^\W\d]\w*)"
QUOTED = r'(?<!:):"(?P<quoted>(?:[^"]|"")+)"'
TOKEN = re.compile("|".join((OPAQUE, QUOTED, QUOTED_NAME, PLAIN)), re.S)


def split(text: str, names: Sequence[str]) -> list[tuple[bool, str]]:
    """The statement in pieces: (True, name) for a placeholder with one of these names, else (False, SQL).

    Strings, comments and quoted names are left as they are, as psql leaves them.
    """
    pieces: list[tuple[bool, str]] = []
    start = 0
    for match in TOKEN.finditer(text):
        name = match["plain"] or (match["quoted"] or "").replace('""', '"')
        if name not in names or not name:
            continue
        pieces += [(False, text[start : match.start()]), (True, name)]
        start = match.end()
    return [*pieces, (False, text[start:])]


def without_its_end(text: str) -> str:
    """The statement without the semicolon that ends it, nor what only blanks and comments follow it with."""
    bare = TOKEN.sub(lambda m: " " * len(m[0]) if m[0].startswith(("--", "/*")) else "x" * len(m[0]), text)
    if (kept := bare.rstrip(" \t\r\n\f;")) and ";" in bare[len(kept) :]:
        return text[: len(kept)].strip()
    return text.strip()


def is_one_expression(text: str) -> bool:
    """Can the text stand in brackets as an expression: closed, and closing nothing that it did not open?"""
    depth = 0
    for mark in re.findall(r"[()\[\];,'\"]|/\*|\$\w*\$", TOKEN.sub(" ", text)):
        if mark not in "()[]" and (mark != "," or not depth):
            return False
        depth += (mark in "([") - (mark in ")]")
        if depth < 0:
            return False
    return depth == 0 and text.strip() != ""


def written(name: str) -> str:
    """The placeholder of that name: quoted where the name would not be read as one word."""
    plain = re.fullmatch(r"[^\W\d]\w*", name)
    return f":{name}" if plain else ':"' + name.replace('"', '""') + '"'
