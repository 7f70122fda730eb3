"""Reads the named blocks of ``runbook_lib/sql/*.sql``.

A block starts with ``-- name:`` and says its purpose, the lock it takes and how it is undone; what follows is
the statement. ``{name}`` is an identifier or expression from :mod:`runbook_lib.core.names`, ``%(name)s`` a bound
value; a per cent sign of SQL is therefore written twice, and so is a brace.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import count
from string import Formatter
from typing import Any

from psycopg import sql

from runbook_lib.sql.key import Key

DOLLAR_TAG = re.compile(r"\$\w*\$")
HEADER = re.compile(r"^-- (name|purpose|lock|undo): *(.*)$")


@dataclass(frozen=True)
class Block:
    """One named statement. ``lock`` names the level and the relation; an empty one is a plain read."""

    name: str
    purpose: str
    lock: str
    undo: str
    text: str

    def compose(self, names: Mapping[str, sql.Composable], indent: int = 0) -> sql.Composed:
        """The statement with its identifiers in place; values stay placeholders.

        A name may hold what ends the body of a function: then another tag encloses the body. indent: blanks in front
        of the block's own lines after the first, not of those that a name brings: they may be part of a string.
        """
        text = self.text.replace("\n", "\n" + " " * indent)
        names = {**names, **self._of_the_key(names)}
        composed = sql.SQL(text).format(**names)
        tags = set(DOLLAR_TAG.findall(self.text))
        if not tags:
            return composed
        (tag,) = tags
        whole = composed.as_string()
        if whole.count(tag) == self.text.count(tag):
            return composed
        other = next(t for n in count(1) if (t := f"$runbook{n}$") not in whole)
        return sql.SQL(text.replace(tag, other)).format(**dict[str, Any](names))

    def _of_the_key(self, names: Mapping[str, sql.Composable]) -> dict[str, sql.Composable]:
        """What the fields say that speak of the key, but for those that are given by name."""
        key, fields = names.get("key"), _fields_of_the_key(self.text)
        if not fields or not isinstance(key, Key):
            return {}
        return {field: key.written(field, names) for field in fields if field not in names}


@cache
def _fields_of_the_key(text: str) -> tuple[str, ...]:
    fields = (field for _, field, _, _ in Formatter().parse(text) if field)
    return tuple(dict.fromkeys(field for field in fields if Key.is_spoken_of(field)))


@cache
def load(module: str) -> dict[str, Block]:
    """The blocks of ``<module>.sql`` by name. Raises ValueError for one without purpose, or two of one name."""
    blocks: dict[str, Block] = {}
    head: dict[str, str] = {}
    body: list[str] = []

    def close() -> None:
        if not head:
            return
        if not head.get("purpose"):
            raise ValueError(f"{module}.sql: block {head['name']} does not say its purpose")
        if head["name"] in blocks:
            raise ValueError(f"{module}.sql: block {head['name']} occurs twice")
        text = "\n".join(body).strip().removesuffix(";")
        blocks[head["name"]] = Block(
            f"{module}.{head['name']}", head["purpose"], head.get("lock", ""), head.get("undo", ""), text
        )

    for line in files(__name__).joinpath(f"{module}.sql").read_text("utf-8").splitlines():
        match = HEADER.match(line)
        if match and match[1] == "name":
            close()
            head, body = {"name": match[2]}, []
        elif match and head:
            head[match[1]] = match[2]
        else:
            body.append(line)
    close()
    return blocks
