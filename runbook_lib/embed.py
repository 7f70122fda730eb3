"""Texts to vectors: loads the model, checks that it fits the column, and checks every vector that it gives."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from runbook_lib.gates import BadInput, Gate, Verdict, gate
from runbook_lib.params import Params

Vectors = NDArray[np.float32]
# Texts in; vectors out, shape (number of texts, dimension), float32. A text without words may come out as NaN.
Model = Callable[[list[str]], Vectors]

# Two probes, so that a model which counts words and does not normalise shows it.
PROBES = ["a user's session", "the session of a user expires and the cookie stays valid after logout"]
# What rounding to float32 and back leaves of a length of 1, with room to spare.
LENGTH_TOLERANCE = 1e-3
EMBEDDING_COLUMN = "embedding"


def model(params: Params) -> Model:
    """The model that the parameters name.

    Raises BadInput where it cannot be loaded, and for ``source: file``, whose vectors are read by :func:`read_file`.
    """
    embeddings = params.embeddings
    if embeddings.source == "wordllama":
        return _wordllama()
    if embeddings.source == "callable":
        return _callable(str(embeddings.callable))
    raise _cannot_load(
        f"source: file ({embeddings.file})",
        "vectors that were made elsewhere, and no model",
        "a model, for texts that have no vector yet",
        "name the model that made the file: source: callable and callable: module:function",
    )


@cache
def _wordllama() -> Model:
    try:
        import wordllama
    except ImportError as error:
        raise _cannot_load(
            "source: wordllama", f"{error}", "package wordllama", "pip install 'pgvector-runbook[demo]'"
        ) from error
    # The weights are part of the package: nothing is fetched, and the model is the one that the lock file pins.
    loaded = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)

    def embed(texts: list[str]) -> Vectors:
        # A text without a token is 0 / 0 there; it comes out as NaN, which check() reports.
        with np.errstate(invalid="ignore"):
            return cast(Vectors, loaded.embed(texts, norm=True))

    return embed


def _callable(name: str) -> Model:
    module_name, _, function_name = name.partition(":")
    needed = "a module that imports, with a function from a list of texts to an array of vectors"
    do = "check the spelling, and that the module is installed in this environment or on PYTHONPATH"
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    # The module is the user's and may fail in any way while it is imported.
    except Exception as error:
        raise _cannot_load(f"source: callable ({name})", f"{type(error).__name__}: {error}", needed, do) from error
    if not callable(found):
        raise _cannot_load(
            f"source: callable ({name})", f"{function_name} is {_a(found)}, not a function", needed, do
        )
    function = cast(Callable[[list[str]], Any], found)

    def embed(texts: list[str]) -> Vectors:
        vectors = np.asarray(function(texts), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise _cannot_load(
                f"source: callable ({name})",
                f"an array of shape {vectors.shape} for {len(texts)} texts",
                f"shape ({len(texts)}, dimension): one row a text",
                "let the function return one vector for each text, in their order",
            )
        return vectors

    return embed


def check_dimension(params: Params) -> Gate:
    """Gate: the model's vectors have the dimension of the column."""
    found = _probe(params).shape[1]
    needed = params.vector.dimension
    return gate(
        "embed.model_dimension_fits",
        found == needed,
        _source(params),
        found=f"{found} dimensions",
        needed=f"{needed}, the dimension of column {params.vector.column}",
        danger="no vector of this model fits into the column; cutting or padding would change every distance",
        do=f"set vector.dimension: {found}, or name the model that the column was made for",
        figures={"found_dimensions": found, "needed_dimensions": needed},
    )


def check_distance(params: Params) -> Gate:
    """Gate: the distance ranks this model's vectors as the model was made to be ranked.

    Vectors of length 1 rank alike under all three distances: l2² = 2 − 2 cos, and the inner product is the cosine.
    With other lengths, l2 and inner_product rank by length too, which only cosine leaves out. Whether a model means
    its lengths cannot be seen from its vectors, so they are refused: normalise them, or say cosine.
    """
    lengths = np.linalg.norm(_probe(params).astype(np.float64), axis=1)
    distance = params.vector.distance
    unit = bool(np.all(np.abs(lengths - 1) < LENGTH_TOLERANCE))
    return gate(
        "embed.model_and_distance_fit",
        distance == "cosine" or unit,
        _source(params),
        found=f"distance {distance}, vectors of length {lengths.min():.3f} to {lengths.max():.3f}",
        needed="distance cosine, or vectors of length 1",
        danger=f"{distance} would rank by the length of the vectors too, so that long or short texts win unasked",
        do="set vector.distance: cosine, or let the model normalise its vectors",
        figures={"shortest": float(lengths.min()), "longest": float(lengths.max())},
    )


def _probe(params: Params) -> Vectors:
    """Vectors of the probes; for ``source: file`` those of its first batch."""
    if params.embeddings.source == "file":
        for _, vectors in read_file(params):
            return vectors
        raise _bad_file(params, "no rows", "a row for each row of the table", "nothing could be loaded")
    try:
        return model(params)(PROBES)
    except BadInput:
        raise
    # The model may be the user's own, and fail in any way.
    except Exception as error:
        raise _cannot_load(
            _source(params),
            f"{type(error).__name__}: {error}",
            f"vectors for {len(PROBES)} probe texts",
            "let the function take any list of texts and return an array of one vector each",
        ) from error


def check(vectors: Vectors, keys: Sequence[object], params: Params) -> tuple[NDArray[np.bool_], list[str]]:
    """Which vectors may be loaded, and why the others may not.

    vectors: shape (n, d); keys: of the same n rows. Returns (mask of shape (n,), one reason for each False in it,
    in order, each naming its key). pgvector refuses NaN and infinity, and under cosine leaves zero vectors out of
    the index without a word. For halfvec, what counts is what is left of a number in two bytes.
    """
    if vectors.shape[1] != params.vector.dimension:
        reason = f"{vectors.shape[1]} dimensions, {params.vector.dimension} needed"
        return np.zeros(len(vectors), dtype=np.bool_), [f"{key}: {reason}" for key in keys]
    with np.errstate(over="ignore"):
        stored = vectors.astype(np.float16) if params.vector.type == "halfvec" else vectors
    finite: NDArray[np.bool_] = np.all(np.isfinite(stored), axis=1)
    zero: NDArray[np.bool_] = np.all(stored == 0, axis=1) & (params.vector.distance == "cosine")
    fit = finite & ~zero
    return fit, [
        f"{keys[i]}: {'a zero vector, which cosine cannot rank' if zero[i] else 'NaN or infinity among its numbers'}"
        for i in np.flatnonzero(~fit).tolist()
    ]


def normalise(vectors: Vectors) -> Vectors:
    """The vectors at length 1; zero vectors and those with NaN stay as they are, for :func:`check` to report.

    Cosine does not need it: it divides by both lengths. Under inner_product and l2 it makes the ranking that of
    cosine, and lets the cheaper inner product stand for it.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    np.divide(vectors, lengths, out=(result := vectors.copy()), where=np.isfinite(lengths) & (lengths > 0))
    return result


def read_file(params: Params) -> Iterator[tuple[list[Any], Vectors]]:
    """Streams the Parquet file: (keys, vectors of shape (n, dimension)), n at most ``embeddings.batch_rows``.

    The file has the key column under the name of ``target.key``, and ``embedding``, a list of floats. Raises
    BadInput that names file, row (counted from 1), key, found and needed; a wrong dimension is never patched.
    """
    path, key_column = Path(str(params.embeddings.file)), params.target.key
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise _bad_file(params, " ".join(str(error).split()), "a Parquet file", "nothing could be loaded") from error
    with file:
        schema = file.schema_arrow
        for name in (key_column, EMBEDDING_COLUMN):
            if name not in schema.names:
                found = f"columns {', '.join(schema.names)}"
                raise _bad_file(params, found, f"columns {key_column} and {EMBEDDING_COLUMN}", "rows cannot be told")
        kind = schema.field(EMBEDDING_COLUMN).type
        if not (_is_list(kind) and pa.types.is_floating(kind.value_type)):
            raise _bad_file(params, f"{EMBEDDING_COLUMN} is {kind}", "list of float", "numbers would be misread")
        first_row = 1
        batches = file.iter_batches(params.embeddings.batch_rows, columns=[key_column, EMBEDDING_COLUMN])
        for batch in batches:
            keys = batch.column(key_column).to_pylist()
            yield keys, _as_vectors(batch.column(EMBEDDING_COLUMN), keys, first_row, params)
            first_row += len(keys)


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _as_vectors(column: pa.Array, keys: list[Any], first_row: int, params: Params) -> Vectors:
    dimension = params.vector.dimension
    lengths = np.array([-1 if n is None else n for n in pc.list_value_length(column).to_pylist()])
    missing_key = np.array([key is None for key in keys], dtype=bool)
    flat = column.drop_null().flatten()
    wrong = np.flatnonzero((lengths != dimension) | missing_key)
    if wrong.size == 0 and flat.null_count:
        nulls = np.asarray(flat.is_null().to_numpy(zero_copy_only=False)).reshape(len(keys), dimension)
        wrong = np.flatnonzero(nulls.any(axis=1))
    if wrong.size:
        i = int(wrong[0])
        if missing_key[i]:
            found, needed = "no key", f"a value of {params.target.key}"
        elif lengths[i] < 0:
            found, needed = "no vector", f"{dimension} dimensions"
        elif lengths[i] != dimension:
            found, needed = f"{lengths[i]} dimensions", f"{dimension} dimensions"
        else:
            found, needed = "a NULL among its numbers", f"{dimension} numbers"
        raise _bad_file(
            params,
            f"row {first_row + i}, key {keys[i]}: {found}",
            needed,
            "a patched vector would stand for a text that it was not made of",
        )
    vectors: Vectors = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(keys), dimension)
    return vectors


def _source(params: Params) -> str:
    embeddings = params.embeddings
    return f"source: {embeddings.source}" + (
        f" ({embeddings.callable or embeddings.file})" if embeddings.source != "wordllama" else ""
    )


def _a(value: object) -> str:
    return f"of type {type(value).__name__}"


def _cannot_load(subject: str, found: str, needed: str, do: str) -> BadInput:
    danger = "no text could be embedded; nothing was started"
    return BadInput([Gate("embed.model_can_be_loaded", Verdict.FAIL, subject, found, needed, danger, do)])


def _bad_file(params: Params, found: str, needed: str, danger: str) -> BadInput:
    do = "mend the file, or make it anew from the table's rows, and run the same command again"
    subject = str(params.embeddings.file)
    return BadInput([Gate("embed.file_is_readable", Verdict.FAIL, subject, found, needed, danger, do)])
