"""How long the texts are, and how much of them the model never reads."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runbook_lib.core import db, row_counts
from runbook_lib.core.gates import BadInput, Gate, gate
from runbook_lib.core.names import names, spelled
from runbook_lib.core.thresholds import apart, at_most
from runbook_lib.embeddings import embedding, masking, reading, splitting
from runbook_lib.embeddings.reading import Read
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("preflight")
# Of a text, at most so many characters are fetched; rows, so that some megabytes are.
LONGEST_FETCHED = 100_000
SAMPLED_ROWS = 300
# Cutting by tokens takes seconds a megabyte.
ROWS_CUT, CUT_CHARACTERS = 300, 4_000
SMALLEST_ADVISED = 100


@dataclass(frozen=True)
class Lengths:
    """Characters of the sampled texts, and of each those that the model never reads: of the whole text, and of its
    chunks, where it is cut."""

    lengths: tuple[int, ...]
    unread: tuple[int, ...]
    unread_in_chunks: tuple[int, ...] | None = None

    def percent(self, unread: Sequence[int]) -> float:
        """Share of the text, all rows together."""
        return 100 * sum(unread) / max(sum(self.lengths), 1)

    def rows_percent(self, unread: Sequence[int]) -> float:
        """Share of the rows that lose something."""
        return 100 * sum(n > 0 for n in unread) / max(len(unread), 1)

    @property
    def lost(self) -> tuple[int, ...]:
        """As the parameters have it."""
        return self.unread if self.unread_in_chunks is None else self.unread_in_chunks


def texts(connection: db.Connection, params: Params, most: int = SAMPLED_ROWS) -> list[db.Row]:
    """Some rows with text: the text, its title and its length."""
    n = row_counts.of(connection, params).n
    query = SQL["texts"].compose(names(params) | {"tablesample": row_counts.some_pages(n, most)})
    return connection.execute(query, {"longest": LONGEST_FETCHED, "rows": most}).fetchall()


def chunks_a_row(connection: db.Connection, params: Params) -> float:
    """Into how many chunks a text is cut, on average, by the beginnings of some; 1 where none is."""
    if params.embeddings.chunks is None or not (rows := texts(connection, params, ROWS_CUT)):
        return 1.0
    cut = splitting.splitter(params)
    whole = [len(cut(r["text"][:CUT_CHARACTERS])) * max(1.0, r["length"] / CUT_CHARACTERS) for r in rows]
    return float(sum(whole) / len(whole))


def gates(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """Gate: the model reads the texts to their end, but for the share that was agreed to. Vectors made elsewhere have
    no model to ask."""
    if not params.embeddings.has_model:
        return
    rows = texts(connection, params)
    lengths = [r["length"] for r in rows]
    try:
        read = reading.measured(embedding.model(params), max(lengths, default=0))
        in_chunks = None if params.embeddings.chunks is None else _unread_in_chunks(params, read, rows)
    except BadInput as error:
        yield from error.problems
        return
    yield _read_whole(params, Lengths(tuple(lengths), tuple(map(read.unread, lengths)), in_chunks), read)


def _unread_in_chunks(params: Params, read: Read, rows: Sequence[db.Row]) -> tuple[int, ...]:
    if read.characters is None:
        return (0,) * len(rows)
    cut, rules = splitting.splitter(params), masking.rules(params.masking)
    return tuple(
        sum(read.unread(len(c.text)) for c in splitting.parts(params, cut, rules, row, Counter())) for row in rows
    )


def _read_whole(params: Params, lengths: Lengths, read: Read) -> Gate:
    accepted = params.embeddings.accept_unread_percent
    share = lengths.percent(lengths.lost)
    said, limit = apart(share, accepted, lambda value, more: f"{value:.{more}f} %")
    found = "no text"
    if lengths.lengths:
        median, longest = statistics.median_high(lengths.lengths), max(lengths.lengths)
        whole = said if lengths.unread_in_chunks is None else f"{lengths.percent(lengths.unread):.0f} %"
        found = (
            f"{median:,} characters at the median, {longest:,} at most, by {len(lengths.lengths)} rows; {read}:"
            f" {whole} of the text, in {lengths.rows_percent(lengths.unread):.0f} % of the rows, would never be read"
        )
        found += "" if lengths.unread_in_chunks is None else f"; in chunks, {said}"
    size = None if read.characters is None else max(SMALLEST_ADVISED, read.characters * 9 // 10 // 100 * 100)
    return gate(
        "embed.texts_are_read_whole",
        at_most(share, accepted),
        spelled(params, "table"),
        found=found,
        needed=f"at most {limit} of the text, as embeddings.accept_unread_percent says",
        danger="no vector holds that part of a text, so that no search by vectors finds it",
        do=f"set embeddings.chunks: {{size: {size}}}, for a vector of each part; or name a model that reads more; or"
        f" accept it: embeddings.accept_unread_percent: {min(100, math.ceil(share))}",
        figures={
            "unread_percent": round(share, 2),
            "unread_whole_percent": round(lengths.percent(lengths.unread), 2),
            "rows_percent": round(lengths.rows_percent(lengths.lost), 2),
            "characters_read": read.characters,
        },
    )
