"""How long the texts are, and how much of them the model never reads."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from runbook_lib.core import db, row_counts
from runbook_lib.core.gates import BadInput, Gate, gate
from runbook_lib.core.names import names, spelled
from runbook_lib.core.thresholds import apart, at_most
from runbook_lib.embeddings import embedding, reading
from runbook_lib.embeddings.reading import Read
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("preflight")
# Of a text, at most so many characters are fetched; rows, so that some megabytes are.
LONGEST_FETCHED = 100_000
SAMPLED_ROWS = 300


@dataclass(frozen=True)
class Lengths:
    """Characters of the sampled texts, and of these those that the model never reads."""

    lengths: tuple[int, ...]
    unread: tuple[int, ...]

    @property
    def unread_percent(self) -> float:
        """Share of the text, all rows together."""
        return 100 * sum(self.unread) / max(sum(self.lengths), 1)

    @property
    def rows_percent(self) -> float:
        """Share of the rows that lose something."""
        return 100 * sum(n > 0 for n in self.unread) / max(len(self.unread), 1)


def texts(connection: db.Connection, params: Params) -> list[db.Row]:
    """Some rows with text: the text, and its length."""
    n = row_counts.of(connection, params).n
    query = SQL["texts"].compose(names(params) | {"tablesample": row_counts.some_pages(n, SAMPLED_ROWS)})
    return connection.execute(query, {"longest": LONGEST_FETCHED, "rows": SAMPLED_ROWS}).fetchall()


def gates(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """Gate: the model reads the texts to their end, but for the share that was agreed to. Vectors made elsewhere have
    no model to ask; on a Citus cluster nobody has tried it."""
    if not params.embeddings.has_model or params.target.distributed:
        return
    found = [r["length"] for r in texts(connection, params)]
    try:
        read = reading.measured(embedding.model(params), max(found, default=0))
    except BadInput as error:
        yield from error.problems
        return
    yield _read_whole(params, Lengths(tuple(found), tuple(map(read.unread, found))), read)


def _read_whole(params: Params, lengths: Lengths, read: Read) -> Gate:
    accepted = params.embeddings.accept_unread_percent
    of_text, limit = apart(lengths.unread_percent, accepted, lambda value, more: f"{value:.{more}f} %")
    found = "no text"
    if lengths.lengths:
        median, longest = statistics.median_high(lengths.lengths), max(lengths.lengths)
        found = (
            f"{median:,} characters at the median, {longest:,} at most, by {len(lengths.lengths)} rows; {read}:"
            f" {of_text} of the text, in {lengths.rows_percent:.0f} % of the rows, would never be read"
        )
    return gate(
        "embed.texts_are_read_whole",
        at_most(lengths.unread_percent, accepted),
        spelled(params, "table"),
        found=found,
        needed=f"at most {limit} of the text, as embeddings.accept_unread_percent says",
        danger="no vector knows of what stands there, and no search by vectors finds it",
        do="name a model that reads more; or accept it: embeddings.accept_unread_percent:"
        f" {min(100, -(-lengths.unread_percent // 1)):.0f}",
        figures={
            "unread_percent": round(lengths.unread_percent, 2),
            "rows_percent": round(lengths.rows_percent, 2),
            "characters_read": read.characters,
        },
    )
