"""How the blocks of SQL write the key of the target, which is one column or several.

What differs between the two is answered here alone. A block says ``{t.key}`` for the columns of the table ``t``, and
``{s.own_key}`` for those of a table of the runbook's own, which has ``key``, or ``key_1``, ``key_2`` and so on:

======================= =================== ================================================================
written                 one column          several
======================= =================== ================================================================
``{t.key}``             t."id"              t."tenant", t."id"
``{t.key AS own_key}``  t."id" AS key       t."tenant" AS key_1, t."id" AS key_2
``{s.own_key = t.key}`` s.key = t."id"      s.key_1 = t."tenant" AND s.key_2 = t."id"
``{t.key IN %keys}``    t."id" = ANY ($1)   EXISTS (SELECT FROM unnest($1) AS k WHERE t."tenant" = … AND …)
``{t.key > %last}``     t."id" > $1         (t."tenant", t."id") > (…), which an index on both serves
``{one t.key AS key}``  t."id" AS key       the values as one text, a JSON list, AS key
======================= =================== ================================================================

A key of several columns is one value outside the database: the text of a JSON list, as PostgreSQL writes it, such as
``[7, "a"]``. :func:`text_of` writes the same in Python.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from psycopg import sql

OWN = "key"
# Words of fields that need the name {key_type} too.
OF_OTHER_NAMES = frozenset(("typed", "texts", "FROM"))


class Key(sql.Composed):
    """The key's columns as a list of names, and every other way to write them.

    named: its columns. columns: the same, quoted. types: asked for only where a value is written, and only of several
    columns.
    """

    def __init__(
        self, named: Sequence[str], columns: Sequence[sql.Composable], types: Callable[[], Sequence[str]]
    ) -> None:
        super().__init__([sql.SQL(", ").join(columns)])
        self.named, self.columns = tuple(named), tuple(columns)
        self.types = types
        self._written: dict[tuple[str, Sequence[str]], sql.Composable] = {}
        own = [sql.SQL(OWN)] if len(columns) == 1 else [sql.SQL(f"{OWN}_{i}") for i, _ in enumerate(columns, 1)]
        self.own: tuple[sql.Composable, ...] = tuple(own)

    @property
    def own_list(self) -> sql.Composed:
        """The columns of the runbook's own tables."""
        return sql.SQL(", ").join(self.own)

    @property
    def names_by_own(self) -> dict[str, sql.Composable]:
        """What each column of the runbook's own tables is called in the table."""
        return {own.as_string(): column for own, column in zip(self.own, self.columns, strict=True)}

    def if_several(self, part: sql.Composable) -> sql.Composable:
        """A part of a statement that only a key of several columns needs; nothing for any other."""
        return part if len(self.columns) > 1 else sql.SQL("")

    def own_in(self, row: Mapping[str, Any]) -> Any:
        """The key of a row of the runbook's own tables, as one value."""
        return _one_of([row[name] for name in self.names_by_own])

    def text_in(self, row: Mapping[str, Any]) -> str:
        """The key of a row that a search has returned, as text: its columns may be called as in the table, or as in
        the runbook's own."""
        names = self.named if self.named[0] in row else tuple(self.names_by_own)
        return str(_one_of([row[name] for name in names]))

    def written(self, field: str, names: Mapping[str, Any] = MappingProxyType({})) -> sql.Composable:
        """What a field of a block stands for. Raises LookupError where it does not speak of the key."""
        # A statement is put together for each batch. What depends on other names is written each time.
        known = (field, self.types())
        if known not in self._written:
            made = self._write(field, names)
            if OF_OTHER_NAMES.intersection(field.split(" ")):
                return made
            self._written[known] = made
        return self._written[known]

    def _write(self, field: str, names: Mapping[str, Any]) -> sql.Composable:
        match field.split(" "):
            case ["one", operand, *rest]:
                return self._one(operand, rest)
            case ["row", operand]:
                parts = self._parts(operand)
                return parts[0] if len(parts) == 1 else sql.SQL("({})").format(sql.SQL(", ").join(parts))
            case [operand, *rest] if operand.rsplit(".", 1)[-1] in ("key", "own_key"):
                return self._with(self._parts(operand), rest, names)
            case ["values", "of", value]:
                return sql.SQL(", ").join(self._values(value))
        raise LookupError(f"{field} says nothing of the key")

    @staticmethod
    def is_spoken_of(field: str) -> bool:
        """Does a field of a block speak of the key? ``{key}`` and ``{own_key}`` are names like any other."""
        return " " in field or field.endswith((".key", ".own_key"))

    def alike(self, one: str, other: str) -> sql.Composable:
        """That two rows have the same key; each as in ``{t.key = s.own_key}``."""
        return self._pairs(self._parts(one), "=", self._parts(other))

    def _parts(self, operand: str) -> list[sql.Composable]:
        alias, _, name = operand.rpartition(".")
        columns = self.own if name == "own_key" else self.columns
        return [sql.SQL(f"{alias}.{{}}").format(c) if alias else c for c in columns]

    def _one(self, operand: str, rest: Sequence[str]) -> sql.Composable:
        """The key as one value, and its name where ``AS`` gives it one."""
        parts = self._parts(operand)
        several = sql.SQL("pg_catalog.jsonb_build_array({})::text").format(sql.SQL(", ").join(parts))
        value = parts[0] if len(parts) == 1 else several
        has_name = len(parts) == 1 and operand.endswith("own_key") and rest[1:] == [OWN]
        return value if not rest or has_name else sql.SQL("{} AS {}").format(value, sql.SQL(rest[1]))

    def _with(self, parts: list[sql.Composable], rest: Sequence[str], names: Mapping[str, Any]) -> sql.Composable:
        several = len(parts) > 1
        row = sql.SQL("({})").format(sql.SQL(", ").join(parts))
        match rest:
            case []:
                return sql.SQL(", ").join(parts)
            case ["AS", "own_key"]:
                return sql.SQL(", ").join(
                    sql.SQL("{} AS {}").format(p, o) for p, o in zip(parts, self.own, strict=True)
                )
            case ["typed"]:
                kinds = map(sql.SQL, self.types()) if several else [names["key_type"]]
                return sql.SQL(", ").join(sql.SQL("{} {}").format(p, k) for p, k in zip(parts, kinds, strict=True))
            case ["FROM", value]:
                return self._rows_of(sql.Placeholder(value.removeprefix("%")), names)
            case ["IS", "NULL"]:
                found = sql.SQL(" OR ").join(sql.SQL("{} IS NULL").format(p) for p in parts)
                return sql.SQL("({})").format(found) if several else found
            case ["IS", "NOT", "NULL"]:
                return sql.SQL(" AND ").join(sql.SQL("{} IS NOT NULL").format(p) for p in parts)
            case ["DESC"]:
                return sql.SQL(", ").join(sql.SQL("{} DESC").format(p) for p in parts)
            case ["NOT", "NULL"]:
                return sql.SQL(",\n    ").join(sql.SQL("ALTER COLUMN {} SET NOT NULL").format(p) for p in parts)
            case ["IN", *cast, value]:
                given = sql.Placeholder(value.removeprefix("%"))
                if several:
                    # Not (…) IN (SELECT …): beside now() Citus spells that wrong to its workers.
                    same = self._pairs(parts, "=", [self._cast(sql.SQL("k"), i) for i in range(len(parts))])
                    query = "EXISTS (SELECT FROM pg_catalog.unnest({}::jsonb[]) AS k WHERE {})"
                    return sql.SQL(query).format(given, same)
                kind = {"typed": "::{}[]", "texts": "::text[]::{}[]"}[cast[0]] if cast else ""
                typed = sql.SQL(kind).format(names["key_type"]) if kind else sql.SQL("")
                return sql.SQL("{} = ANY ({}{})").format(parts[0], given, typed)
            case [operator, "one", value]:
                one = sql.SQL("{}::jsonb" if several else "{}").format(sql.SQL(value))
                others = [self._cast(one, i) for i in range(len(parts))] if several else [one]
                return self._pairs(parts, operator, others)
            case [operator, value] if value.startswith("%"):
                given_row = sql.SQL(", ").join(self._values(value))
                form = "{} {} ({})" if several else "{} {} {}"
                return sql.SQL(form).format(row if several else parts[0], sql.SQL(operator), given_row)
            case [operator, other]:
                return self._pairs(parts, operator, self._parts(other))
        raise ValueError(f"a key is not written like this: {' '.join(rest)}")

    def _pairs(
        self, parts: Sequence[sql.Composable], operator: str, others: Sequence[sql.Composable]
    ) -> sql.Composable:
        each = sql.SQL("{} {} {}")
        pairs = zip(parts, others, strict=True)
        return sql.SQL(" AND ").join(each.format(a, sql.SQL(operator), b) for a, b in pairs)

    def _rows_of(self, given: sql.Composable, names: Mapping[str, Any]) -> sql.Composable:
        """A list of keys as rows, each with its place in it."""
        if len(self.columns) == 1:
            rows = "unnest({}::{}[]) WITH ORDINALITY u (key, n)"
            return sql.SQL(rows).format(given, names["key_type"])
        values = [sql.SQL("{} AS {}").format(self._cast(sql.SQL("k"), i), own) for i, own in enumerate(self.own)]
        rows = "(SELECT {}, n FROM unnest({}::jsonb[]) WITH ORDINALITY k (k, n)) u"
        return sql.SQL(rows).format(sql.SQL(", ").join(values), given)

    def _values(self, value: str) -> list[sql.Composable]:
        """A bound value, as the columns that it stands for."""
        given = sql.Placeholder(value.removeprefix("%"))
        if len(self.columns) == 1:
            return [given]
        return [self._cast(sql.SQL("{}::jsonb").format(given), i) for i in range(len(self.columns))]

    def _cast(self, value: sql.Composable, place: int) -> sql.Composable:
        kind = sql.SQL(self.types()[place].replace("%", "%%"))
        return sql.SQL("({} ->> {})::{}").format(value, sql.Literal(place), kind)


def _one_of(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else text_of(values)


def type_of_one(types: Sequence[str]) -> str:
    """The type of a key as one value. types: of its columns."""
    return types[0] if len(types) == 1 else "text"


def text_of(values: Iterable[object]) -> str:
    """The value of a key of several columns, spelt as PostgreSQL spells it: whole numbers as they are, all else as
    text."""
    return json.dumps([v if v is None or isinstance(v, int) else str(v) for v in values], ensure_ascii=False)


def values_of(text: str) -> list[Any]:
    """The values that such a text stands for: whole numbers and texts. Raises ValueError for any other text."""
    values = json.loads(text)
    if not isinstance(values, list):
        raise ValueError(f"{text} is no JSON list")
    return values
