"""Texts to vectors: loads the model, checks that it fits the column, and checks every vector that it gives."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, RunbookError, gate
from runbook_lib.core.redaction import redacted
from runbook_lib.embeddings import endpoint, masking, sources, vector_table
from runbook_lib.embeddings.endpoint import cannot_load
from runbook_lib.embeddings.sources import SourceRows, Vectors
from runbook_lib.params import Params

# Texts in, as the model may see them: whoever asks masks them first. Vectors out, shape (number of texts,
# dimension), float32. A text without words may come out as NaN.
Model = Callable[[list[str]], Vectors]

# Two probes, so that a model which counts words and does not normalise shows it.
PROBES = ["a user's session", "the session of a user expires and the cookie stays valid after logout"]
# What rounding to float32 and back leaves of a length of 1, with room to spare.
LENGTH_TOLERANCE = 1e-3
LONGEST_ERROR = 500
# Kinds of numpy's types that are read: float, int, unsigned; objects, if they are numbers.
NUMBERS = "fiuO"
# Texts that WordLlama takes at once, as many as by default, and characters, with those that it is padded by.
WORDLLAMA_BATCH, MOST_PADDED_CHARACTERS = 64, 200_000
NOT_EMBEDDED = "the rows of this batch have no vectors; what was done before them is kept"


class ModelAway(RunbookError):
    """The model fails on harmless texts too, so no row is to blame."""


class AskedText(Protocol):
    """What is asked: see :class:`runbook_lib.benchmark.query_set.Query`."""

    @property
    def query_id(self) -> str: ...
    @property
    def text(self) -> str: ...


def model(params: Params) -> Model:
    """The model that the parameters name; its vectors at length 1 where they ask for it.

    Raises BadInput where it cannot be loaded, and for vectors made elsewhere, which :func:`stored` reads.
    """
    made = _as_made(params)
    return (lambda texts: normalise(made(texts))) if params.embeddings.normalise else made


def _as_made(params: Params) -> Model:
    embeddings = params.embeddings
    if embeddings.source == "wordllama":
        return _wordllama()
    if embeddings.source == "callable":
        return _callable(str(embeddings.callable))
    if embeddings.source == "http":
        return endpoint.model(params)
    raise cannot_load(
        described(params),
        "vectors that were made elsewhere, and no model",
        "a model, for texts that have no vector yet",
        "name the model that made them, source: callable or http, or give queries.embeddings for the queries",
    )


def query_vectors(params: Params, queries: Sequence[AskedText]) -> Vectors:
    """Vectors of these queries, shape (number of queries, dimension): from ``queries.embeddings``, or by the model.

    Raises BadInput where there is neither, or a query without its vector.
    """
    if params.queries.embeddings is not None:
        ids = [q.query_id for q in queries]
        found = sources.query_vectors(params.queries.embeddings, params.vector.dimension, ids)
        return normalise(found) if params.embeddings.normalise else found
    return model(params)(masking.masked(params, [q.text for q in queries]))


def stored(params: Params, connection: db.Connection | None = None) -> Iterator[SourceRows]:
    """The vectors made elsewhere, in batches: from the file, or from the table over this or an own connection; at
    length 1 where the parameters ask for it."""
    for rows in _as_stored(params, connection):
        yield replace(rows, vectors=normalise(rows.vectors)) if params.embeddings.normalise else rows


def _as_stored(params: Params, connection: db.Connection | None) -> Iterator[SourceRows]:
    if params.embeddings.source == "file":
        yield from sources.read(sources.wanted(params))
    elif connection is not None:
        yield from vector_table.read(connection, params)
    else:
        with db.connect(params, "runbook source table") as own:
            yield from vector_table.read(own, params)


@dataclass(frozen=True)
class Embedded:
    """What a model made of some texts. places: of the texts that it took; vectors: theirs; errors: by place."""

    places: list[int]
    vectors: Vectors
    errors: dict[int, Exception]


def said(error: Exception) -> str:
    """What a model's error says, on one bounded line, no half of a secret at its end; it may quote the text, so gates
    show its type alone."""
    what = error.found if isinstance(error, RunbookError) else str(error)
    return f"{type(error).__name__}: {redacted(' '.join(what.split()))}"[:LONGEST_ERROR]


def embed_each(ask: Model, texts: list[str], *, probed: bool = False) -> Embedded:
    """Embeds what the model takes: a batch that fails is halved until the texts that are to blame are alone.

    Where the model does not take the harmless probes either, it raises ModelAway. probed: it takes them.
    """
    try:
        return Embedded(list(range(len(texts))), ask(texts), {})
    except (BadInput, endpoint.EndpointAway):
        raise
    # The model may be the user's own, and fail in any way.
    except Exception as error:
        if not probed:
            _must_take_probes(ask, texts, error)
        if len(texts) == 1:
            return Embedded([], np.zeros((0, 0), dtype=np.float32), {0: error})
    middle = len(texts) // 2
    first, second = (embed_each(ask, part, probed=True) for part in (texts[:middle], texts[middle:]))
    made = [part.vectors for part in (first, second) if part.places]
    return Embedded(
        first.places + [middle + i for i in second.places],
        np.concatenate(made) if made else np.zeros((0, 0), dtype=np.float32),
        first.errors | {middle + i: error for i, error in second.errors.items()},
    )


def _must_take_probes(ask: Model, texts: list[str], error: Exception) -> None:
    try:
        ask(PROBES)
    except Exception as of_probes:
        # Of the first error its type alone: what it says may quote a row.
        raise ModelAway(
            found=f"{type(error).__name__} on {len(texts)} texts; on {len(PROBES)} probe texts {said(of_probes)}",
            needed="vectors for the probe texts",
            danger=NOT_EMBEDDED,
            do="see to the model, and run this phase again: it resumes where it stopped",
        ) from None


@cache
def _wordllama() -> Model:
    try:
        import wordllama
    except ImportError as error:
        raise cannot_load(
            "source: wordllama", f"{error}", "package wordllama", "pip install 'pgvector-runbook[demo]'"
        ) from error
    # The weights are part of the package: nothing is fetched, and the model is the one that the lock file pins.
    loaded = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)

    def embed(texts: list[str]) -> Vectors:
        # It pads the texts of a batch to the longest, and one of a hundred pages would make that gigabytes.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        made = np.empty((len(texts), loaded.embedding.shape[1]), np.float32)
        # A text without a token is 0 / 0 there; it comes out as NaN, which check() reports.
        with np.errstate(invalid="ignore"):
            for some in (order[i : i + WORDLLAMA_BATCH] for i in range(0, len(order), WORDLLAMA_BATCH)):
                fit = max(1, MOST_PADDED_CHARACTERS // max(1, len(texts[some[-1]])))
                made[some] = loaded.embed([texts[i] for i in some], norm=True, batch_size=fit)
        return made

    return embed


def _callable(name: str) -> Model:
    module_name, _, function_name = name.partition(":")
    needed = "a module that imports, with a function from a list of texts to an array of vectors"
    do = "check the spelling, and that the module is installed in this environment or on PYTHONPATH"
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    # The module is the user's and may fail in any way while it is imported.
    except Exception as error:
        raise cannot_load(f"source: callable ({name})", f"{type(error).__name__}: {error}", needed, do) from error
    if not callable(found):
        raise cannot_load(f"source: callable ({name})", f"{function_name} is {_a(found)}, not a function", needed, do)
    function, dimensions = cast(Callable[[list[str]], Any], found), set[int]()

    def embed(texts: list[str]) -> Vectors:
        given = _apart(function, list(texts))
        try:
            vectors = np.asarray(given)
            if vectors.dtype.kind not in NUMBERS:
                raise TypeError
            vectors = vectors.astype(np.float32, copy=False)
        except (TypeError, ValueError) as error:
            found = f"{_a(given)}, no array of numbers, for {len(texts)} texts"
            raise _not_one_a_text(name, len(texts), found) from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise _not_one_a_text(name, len(texts), f"an array of shape {vectors.shape} for {len(texts)} texts")
        dimensions.add(vectors.shape[1])
        if len(dimensions) > 1:
            raise _not_one_a_text(name, len(texts), f"vectors of {' and of '.join(map(str, dimensions))} dimensions")
        return vectors

    return embed


def _apart(function: Callable[[list[str]], Any], texts: list[str]) -> Any:
    """Calls the user's function. What it prints may quote texts and is dropped: the record must not hold any. A child
    that it has forked, and that comes back, ends here: it would work on with this process's connections.
    """
    process = os.getpid()
    try:
        with _unheard():
            return function(texts)
    finally:
        if os.getpid() != process:
            os._exit(1)


@contextmanager
def _unheard() -> Iterator[None]:
    """Drops what is printed in the block: by Python, and by what writes past it, a C library or a child process. A
    kernel would pass that on into the record too.
    """
    # A descriptor that was closed when Python began may be a connection's by now.
    open_ones = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and not stream.closed]
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        kept = {descriptor: os.dup(descriptor) for descriptor in open_ones}
        try:
            for descriptor in kept:
                os.dup2(nowhere.fileno(), descriptor)
            yield
        finally:
            # What C has not written yet would be heard later.
            ctypes.CDLL(None).fflush(None)
            for descriptor, original in kept.items():
                os.dup2(original, descriptor)
                os.close(original)


def _not_one_a_text(name: str, texts: int, found: str) -> BadInput:
    return cannot_load(
        f"source: callable ({name})",
        found,
        f"shape ({texts}, dimension): one row a text",
        "let the function return one vector for each text, in their order",
        NOT_EMBEDDED,
    )


def check_dimension(params: Params) -> Gate:
    """Gate: the vectors have the dimension of the column. Of stored ones the first batch is looked at."""
    needed = params.vector.dimension
    if params.embeddings.has_model:
        dimensions = _probe(params).shape[1]
        holds, found = dimensions == needed, f"{dimensions} dimensions"
        do = f"set vector.dimension: {dimensions}, or name the model that the column was made for"
    else:
        rows = _first_rows(params)
        holds = len(rows.faults) < len(rows.keys)
        first = next(iter(rows.faults), 0)
        found = f"row {rows.places[first]}, key {rows.keys[first]}: {rows.faults.get(first)}"
        found = f"{needed} dimensions" if holds else found
        do = "set vector.dimension to what the vectors have, or make them again with the model that the column is for"
    return gate(
        "embed.model_dimension_fits",
        holds,
        described(params),
        found=found,
        needed=f"{needed}, the dimension of column {params.vector.column}",
        danger="no vector of this model fits into the column; cutting or padding would change every distance",
        do=do,
        figures={"needed_dimensions": needed},
    )


def check_distance(params: Params) -> Gate:
    """Gate: the distance ranks this model's vectors as the model was made to be ranked.

    Vectors of length 1 rank alike under all three distances: l2² = 2 − 2 cos, and the inner product is the cosine.
    With other lengths, l2 and inner_product rank by length too, which only cosine leaves out. Whether a model means
    its lengths cannot be seen from its vectors, so they are refused: say cosine, or ``normalise``.
    """
    lengths = np.linalg.norm(_probe(params).astype(np.float64), axis=1)
    distance = params.vector.distance
    unit = bool(np.all(np.abs(lengths - 1) < LENGTH_TOLERANCE))
    found = f"vectors of length {lengths.min():.3f} to {lengths.max():.3f}" if len(lengths) else "no sound vector"
    return gate(
        "embed.model_and_distance_fit",
        (distance == "cosine" or unit) if len(lengths) else None,
        described(params),
        found=f"distance {distance}, {found}",
        needed="distance cosine, or vectors of length 1",
        danger=f"{distance} would rank by the length of the vectors too, so that long or short texts win unasked",
        do="set vector.distance: cosine, or embeddings.normalise: true if its lengths mean nothing",
        figures={"shortest": float(lengths.min()), "longest": float(lengths.max())} if len(lengths) else {},
    )


def _first_rows(params: Params) -> SourceRows:
    for rows in stored(params):
        return rows
    subject = params.embeddings.file or params.embeddings.table or ""
    raise sources.bad_file(subject, "no rows", "a row for each row of the table", "nothing could be loaded")


def _probe(params: Params) -> Vectors:
    """Vectors of the probes; of stored ones those of the first batch that could be read."""
    if not params.embeddings.has_model:
        rows = _first_rows(params)
        return np.delete(rows.vectors, list(rows.faults), axis=0)
    try:
        return model(params)(PROBES)
    except BadInput:
        raise
    # The model may be the user's own, and fail in any way.
    except Exception as error:
        raise cannot_load(
            described(params),
            f"{type(error).__name__}: {' '.join(str(error).split())}",
            f"vectors for {len(PROBES)} probe texts",
            "let the function take any list of texts and return an array of one vector each",
        ) from error


def check(vectors: Vectors, params: Params) -> dict[int, str]:
    """What is wrong with vectors of shape (n, d), by index; a vector that may be loaded is not named.

    pgvector refuses NaN and infinity, and under cosine leaves zero vectors out of the index without a word. For
    halfvec, in the column or in the index, what counts is what is left of a number in two bytes.
    """
    if vectors.shape[1] != params.vector.dimension:
        reason = f"{vectors.shape[1]} dimensions, {params.vector.dimension} needed"
        return dict.fromkeys(range(len(vectors)), reason)
    with np.errstate(over="ignore"):
        looked_at = vectors.astype(np.float16) if "halfvec" in (params.vector.type, params.indexed_type) else vectors
    # A sum is finite unless a number is not, or the sum itself overflows; the few that are not are looked at closely.
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", looked_at, looked_at, dtype=np.float32)
    faults: dict[int, str] = {}
    for i in np.flatnonzero(~np.isfinite(squares) | (squares == 0)).tolist():
        if not np.isfinite(looked_at[i]).all():
            faults[i] = "NaN or infinity among its numbers"
        elif params.vector.distance == "cosine" and not looked_at[i].any():
            faults[i] = "a zero vector, which cosine cannot rank"
    return faults


def normalise(vectors: Vectors) -> Vectors:
    """The vectors at length 1; zero vectors and those with NaN stay as they are, for :func:`check` to report.

    Cosine does not need it: it divides by both lengths. Under inner_product and l2 it makes the ranking that of
    cosine, whatever the length of the query.
    """
    # In double precision, since a sum of squares passes what single precision holds long before a number does.
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    np.divide(
        vectors,
        lengths,
        out=(result := vectors.copy()),
        casting="same_kind",
        where=np.isfinite(lengths) & (lengths > 0),
    )
    return result


def described(params: Params) -> str:
    """The source, as messages name it."""
    e = params.embeddings
    named = e.callable or e.file or e.table or e.url
    return f"source: {e.source}" + (f" ({named})" if named else "")


def _a(value: object) -> str:
    return f"of type {type(value).__name__}"
