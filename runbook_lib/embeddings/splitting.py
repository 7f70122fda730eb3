"""A text as the model gets it: whole, or in chunks that end where a paragraph, a sentence or a word does.

Splitting is semantic-text-splitter's: it goes by Unicode's borders of sentences and words, takes a model's own
tokenizer as its measure, says where each chunk stands, and needs no other package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runbook_lib.core import db
from runbook_lib.embeddings import embedding, masking
from runbook_lib.embeddings.embedding import Model
from runbook_lib.embeddings.endpoint import cannot_load
from runbook_lib.embeddings.sources import Vectors
from runbook_lib.params import Params
from runbook_lib.params.data import Chunks


@dataclass(frozen=True)
class Chunk:
    """A part of a row's text. text: as the model may see it. start: its first character, from 1 on, as SQL's substr
    counts; length: its characters, both in the text as the table has it."""

    text: str
    start: int
    length: int


# From a text to its parts, each with the place of its first character.
Splitter = Callable[[str], list[tuple[int, str]]]


def splitter(params: Params) -> Splitter:
    """Cuts a text; each part comes with the place of its first character, from 0 on.

    Raises BadInput where the tokenizer cannot be read.
    """
    chunks = params.embeddings.chunks
    if chunks is None:
        return lambda text: [(0, text)]
    cut = _cutter(params, chunks)
    # What is nothing but blanks to Unicode may be text to the database.
    return lambda text: cut.chunk_indices(text) or [(0, text)]


def _cutter(params: Params, chunks: Chunks) -> Any:
    from semantic_text_splitter import TextSplitter

    if chunks.by == "characters":
        return TextSplitter(chunks.size, overlap=chunks.overlap)
    path = params.embeddings.tokenizer or _of_wordllama()
    try:
        return TextSplitter.from_huggingface_tokenizer_str(
            path.read_text("utf-8"), chunks.size, overlap=chunks.overlap
        )
    # The library raises Exception itself for what is no tokenizer.
    except Exception as error:
        raise cannot_load(
            f"embeddings.tokenizer ({path.name})",
            f"{type(error).__name__}: {error}",
            "a tokenizer.json of Hugging Face's tokenizers",
            "name the file tokenizer.json that the model comes with, or set embeddings.chunks.by: characters",
        ) from error


def _of_wordllama() -> Path:
    import wordllama

    return Path(wordllama.__file__).parent / "tokenizers" / "l2_supercat_tokenizer_config.json"


def parts(
    params: Params, cut: Splitter, rules: Sequence[masking.Rule], row: db.Row, counts: Counter[str]
) -> list[Chunk]:
    """A row's text in parts. It is masked whole and cut then, so that no value is cut in two and seen by no rule."""
    text, replaced = masking.mask_one(row["text"], rules, counts)
    title = _title(params, rules, row)
    found = []
    for start, part in cut(text):
        first, end = start, start + len(part)
        for r in reversed(replaced):
            first, end = r.before(first, is_end=False), r.before(end, is_end=True)
        own = f"{title}\n{part}" if title and not (start == 0 and text.startswith(title)) else part
        found.append(Chunk(own, first + 1, end - first))
    return found


def _title(params: Params, rules: Sequence[masking.Rule], row: db.Row) -> str:
    chunks = params.embeddings.chunks
    return masking.mask_one(row["title"] or "", rules, Counter())[0].strip() if chunks and chunks.title else ""


@dataclass(frozen=True)
class EmbeddedRows:
    """Vectors of rows. rows: the index of the row that each vector is of, all chunks of a row together, in order;
    chunks: likewise. errors: by index of the row, which has no vectors then."""

    rows: list[int]
    chunks: list[Chunk]
    vectors: Vectors
    errors: dict[int, Exception]

    def numbered(self) -> list[int]:
        """The number of each vector within its row, from 0 on."""
        seen: Counter[int] = Counter()
        numbers = []
        for row in self.rows:
            numbers.append(seen[row])
            seen[row] += 1
        return numbers


def embed_rows(
    params: Params, ask: Model, cut: Splitter, rules: Sequence[masking.Rule], rows: Sequence[db.Row]
) -> tuple[EmbeddedRows, Counter[str]]:
    """Embeds the texts of these rows; and how many values each rule replaced.

    A row whose chunks the model does not all take has none. A chunk without a direction, such as a line of dashes,
    is left out where its row has others: there is nothing in it to be found.
    """
    counts: Counter[str] = Counter()
    of_rows = [parts(params, cut, rules, row, counts) for row in rows]
    owner = [i for i, chunks in enumerate(of_rows) for _ in chunks]
    chunks = [chunk for chunks in of_rows for chunk in chunks]
    made = embedding.embed_each(ask, [c.text for c in chunks])
    errors = {owner[i]: error for i, error in made.errors.items()}
    unsound = embedding.check(made.vectors, params) if len(chunks) > len(rows) and made.places else {}
    sound = {owner[place] for at, place in enumerate(made.places) if at not in unsound}
    kept, begun = [], set[int]()
    for at, place in enumerate(made.places):
        row = owner[place]
        if row not in errors and (at not in unsound if row in sound else row not in begun):
            kept.append(at)
            begun.add(row)
    places = [made.places[at] for at in kept]
    whole = len(kept) == len(made.places)
    vectors = made.vectors if whole else made.vectors[np.array(kept, np.intp)]
    return EmbeddedRows([owner[i] for i in places], [chunks[i] for i in places], vectors, errors), counts
