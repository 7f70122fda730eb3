"""What a function of the search takes and gives, and how the catalogue has it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.names import has_chunks, identifier, verbatim
from runbook_lib.params import Params
from runbook_lib.search import conditions
from runbook_lib.sql import DOLLAR_TAG

# Where the row's nearest chunk is in its text, as substr counts.
PLACE = ("chunk_start", "chunk_length")
# Rows that a call gets which does not say how many, or says NULL.
DEFAULT_K = 10


@dataclass(frozen=True)
class Argument:
    """Of a function. type: as SQL spells it. default: as SQL, empty for none."""

    name: str
    type: str
    default: str = ""

    def declared(self) -> sql.Composable:
        default = f" DEFAULT {self.default}" if self.default else ""
        return sql.SQL("{} {}").format(identifier(self.name), verbatim(self.type + default))


@dataclass(frozen=True)
class Function:
    """A function to be installed. made: the statement that makes it. results: the columns of its rows."""

    schema: str
    name: str
    arguments: Sequence[Argument]
    results: Sequence[Argument]
    made: sql.Composed

    @property
    def signature(self) -> sql.Composable:
        """Name and types, as GRANT and DROP want them."""
        types = sql.SQL(", ").join(verbatim(a.type) for a in self.arguments)
        return sql.SQL("{}({})").format(identifier(self.schema, self.name), types)

    def wanted(self, connection: db.Connection) -> dict[str, object]:
        """What the catalogue will say of it."""
        text = self.made.as_string(connection).replace("%%", "%")
        # What ends the statement encloses the body; a name may hold another.
        body = text.split(DOLLAR_TAG.findall(text)[-1])[1]
        columns = [*self.arguments, *self.results]
        return {
            "schema": self.schema,
            "name": self.name,
            "takes": [a.type for a in self.arguments],
            "names": [a.name for a in columns],
            "types": [a.type for a in columns],
            "defaults": [a.default for a in self.arguments if a.default],
            "source": hashlib.md5(body.encode(), usedforsecurity=False).hexdigest(),
        }


def filter_arguments(connection: db.Connection, params: Params) -> list[Argument]:
    """The arguments for the filters: NULL, the default, lets every row through."""
    types = conditions.types(connection, params)
    return [Argument(f"filter_{column}", types[column], "NULL") for column in params.target.filters]


def arguments(connection: db.Connection, params: Params) -> list[Argument]:
    """Those of the function that the application calls; the functions that answer for it take the same."""
    least = params.search.smallest_similarity
    # As PostgreSQL spells it, so that the one in the catalogue can be compared.
    spelt = "NULL" if least is None else f"'{repr(least).removesuffix('.0')}'::double precision"
    return [
        Argument("query_text", "text"),
        Argument("query_embedding", "real[]", "NULL"),
        Argument("k", "integer", str(DEFAULT_K)),
        *filter_arguments(connection, params),
        Argument("min_similarity", "double precision", spelt),
    ]


def results(connection: db.Connection, params: Params) -> list[Argument]:
    """The columns of an answer: those of earlier releases first, for callers that read them by their place."""
    key = params.target.key_columns
    types = conditions.of_columns(connection, params, [*key, *params.search.returns])
    return [
        *(Argument(column, types[column]) for column in key),
        Argument("score", "double precision"),
        Argument("answered_by", "text"),
        Argument("similarity", "double precision"),
        Argument("rank", "integer"),
        *(Argument(name, "integer") for name in PLACE if has_chunks(params)),
        *(Argument(column, types[column]) for column in params.search.returns),
    ]
