"""Vectors made elsewhere: files and tables, read batch by batch in bounded memory.

Whatever the format, a reader gives :class:`SourceRows`. A row whose vector cannot be read is no reason to stop: it
comes with its fault, which the load writes down. A file that is no such file at all is BadInput.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tokenize
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.names import HASH_BYTES
from runbook_lib.embeddings import json_block, memory
from runbook_lib.params import Params
from runbook_lib.params.data import FORMATS
from runbook_lib.params.section import unsound
from runbook_lib.sql import key

Vectors = NDArray[np.float32]

EMBEDDING_COLUMN = "embedding"
# Either says which text a vector was made from.
HASH_COLUMN, TEXT_COLUMN = "text_hash", "text"
# Parquet column chunks are read in pieces of this size; without it a row group of any size is read whole.
READ_BUFFER_BYTES = 8 * 1024 * 1024
# csv's own limit would cut vectors of more than about 6,000 digits' worth of numbers.
LONGEST_FIELD = 16 * 1024 * 1024
# A line is read whole before it is looked at; one without an end would take all memory.
LONGEST_LINE = 64 * 1024 * 1024
ARROW_FILE_MAGIC, NPY_MAGIC = b"ARROW1", b"\x93NUMPY"
INTEGERS = {"smallint": 2**15, "integer": 2**31, "bigint": 2**63}


@dataclass(frozen=True)
class SourceRows:
    """Some rows of a source, in its order.

    places: where each row stands, from 1 (line or row). keys: as the source has them. vectors: shape (n, dimension),
    zeros where there is a fault. faults: what is wrong, by index. text_hashes: of the texts that the vectors were
    made from, or None where the source does not say.
    """

    places: Sequence[int]
    keys: list[Any]
    vectors: Vectors
    faults: dict[int, str]
    text_hashes: list[bytes | None] | None


@dataclass(frozen=True)
class Wanted:
    """What a file must hold: the names of its key's columns, and the dimension of its vectors."""

    path: Path
    format: str
    key: tuple[str, ...]
    dimension: int
    rows: int
    ids_file: Path | None = None


def wanted(params: Params) -> Wanted:
    """The file of the parameters, with the target's key."""
    e = params.embeddings
    return Wanted(
        Path(str(e.file)),
        str(e.file_format),
        params.target.key_columns,
        params.vector.dimension,
        e.rows_a_batch,
        e.ids_file,
    )


def read(file: Wanted) -> Iterator[SourceRows]:
    """Streams the file, at most ``file.rows`` rows at a time.

    Raises BadInput that names the file, what was found and what is needed, where it cannot be read at all.
    """
    readers = {"parquet": _parquet, "arrow": _arrow, "npy": _npy, "jsonl": _json_lines, "csv": _csv}
    try:
        yield from memory.bounded(readers[file.format](file))
    except MemoryError as error:
        most = f"{memory.MOST_BYTES_A_BATCH / 1024**3:.1f} GB"
        found, needed = f"rows that unpack to more than {most}", f"batches of at most {most} in memory"
        danger = "the system could kill what needs memory, the database server too where it is on this machine"
        raise bad_file(file.path, found, needed, danger) from error
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        kind = {"parquet": "a Parquet file", "arrow": "an Arrow file", "npy": "an .npy file"}
        needed = kind.get(file.format, "a file in UTF-8" if isinstance(error, UnicodeDecodeError) else "a file")
        raise bad_file(file.path, " ".join(str(error).split()), needed, "nothing could be loaded") from error


def lines_of(path: Path, *, encoding: str = "utf-8", newline: str | None = None) -> Iterator[str]:
    """The lines of a text file, each of bounded length. Raises BadInput for a longer one."""
    with path.open(encoding=encoding, newline=newline) as lines:
        for number, line in enumerate(iter(partial(lines.readline, LONGEST_LINE), ""), 1):
            if len(line) == LONGEST_LINE:
                found = f"line {number} has more than {LONGEST_LINE} characters"
                raise bad_file(path, found, "a row a line", "nothing could be loaded")
            yield line


def bad_file(path: Path | str, found: str, needed: str, danger: str) -> BadInput:
    """A source that cannot be read at all."""
    do = "fix the file, or export it again from the table's rows, and rerun the same command"
    return BadInput([Gate("embed.file_is_readable", Verdict.FAIL, str(path), found, needed, danger, do)])


def _check_columns(file: Wanted, found: Sequence[str]) -> list[str]:
    """The columns to read, in order; raises BadInput where key or vector is missing, or one of them twice there."""
    columns = [*file.key, EMBEDDING_COLUMN, *[c for c in (HASH_COLUMN, TEXT_COLUMN) if c in found][:1]]
    if any(found.count(name) != 1 for name in columns):
        needed = f"columns {', '.join(file.key)} and {EMBEDDING_COLUMN}"
        raise bad_file(file.path, f"columns {', '.join(found)}", needed, "rows cannot be told")
    return columns


def _parquet(file: Wanted) -> Iterator[SourceRows]:
    with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=READ_BUFFER_BYTES) as parquet:
        columns = _check_arrow(file, parquet.schema_arrow)
        batches = parquet.iter_batches(file.rows, columns=columns, use_threads=False)
        yield from _from_arrow(file, batches)


def _arrow(file: Wanted) -> Iterator[SourceRows]:
    with pa.memory_map(str(file.path)) as source:
        is_file = source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
        source.seek(0)
        open_ = pa.ipc.open_file if is_file else pa.ipc.open_stream
        columns = _check_arrow(file, (reader := open_(source)).schema)
        # Columns that are not wanted are not unpacked.
        fields = [reader.schema.get_field_index(c) for c in columns]
        source.seek(0)
        reader = open_(source, options=pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields))
        whole = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        yield from _from_arrow(file, (b.select(columns) for b in whole))


def _check_arrow(file: Wanted, schema: pa.Schema) -> list[str]:
    columns = _check_columns(file, schema.names)
    kind = schema.field(EMBEDDING_COLUMN).type
    types = pa.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not (is_list and types.is_floating(kind.value_type)):
        raise bad_file(file.path, f"{EMBEDDING_COLUMN} is {kind}", "list of float", "numbers would be misread")
    return columns


def _from_arrow(file: Wanted, batches: Iterable[pa.RecordBatch]) -> Iterator[SourceRows]:
    first = 1
    for whole in batches:
        # Arrow believes what a file says of itself, and reads beyond its end.
        whole.validate(full=True)
        for start in range(0, whole.num_rows, file.rows):
            batch = whole.slice(start, file.rows)
            yield _rows_of(file, batch, range(first, first + batch.num_rows))
            first += batch.num_rows


def _rows_of(file: Wanted, batch: pa.RecordBatch, places: Sequence[int]) -> SourceRows:
    vectors, faults = _arrow_vectors(batch.column(EMBEDDING_COLUMN), file.dimension)
    given = [batch.column(n).to_pylist() if n in batch.schema.names else None for n in (HASH_COLUMN, TEXT_COLUMN)]
    hashes = _hashes(given[0], given[1], faults)
    return SourceRows(places, _keys([_list_of(batch.column(c)) for c in file.key]), vectors, faults, hashes)


def _list_of(column: pa.Array) -> list[Any]:
    whole_numbers = pa.types.is_integer(column.type) and not column.null_count
    return list(column.to_numpy().tolist() if whole_numbers else column.to_pylist())


def _keys(columns: Sequence[list[Any]]) -> list[Any]:
    """A key a row: its value, or the values of its columns."""
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def _arrow_vectors(column: pa.Array, dimension: int) -> tuple[Vectors, dict[int, str]]:
    """NULLs among the numbers come out as NaN, which the check of every vector refuses."""
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    fit = lengths == dimension
    numbers = column.filter(pa.array(fit)).flatten() if not fit.all() else column.flatten()
    with np.errstate(over="ignore"):
        read = numbers.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, dimension)
    if fit.all():
        return read, {}
    vectors = np.zeros((len(column), dimension), dtype=np.float32)
    vectors[fit] = read
    return vectors, {int(i): _length_fault(int(lengths[i]), dimension) for i in np.flatnonzero(~fit)}


def _length_fault(found: int, dimension: int) -> str:
    return f"no vector, {dimension} dimensions needed" if found < 0 else f"{found} dimensions, {dimension} needed"


def _npy(file: Wanted) -> Iterator[SourceRows]:
    """The vectors are mapped, not read: a row that is staged already costs no disk."""
    vectors = _mapped(file.path)
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        found, needed = f"{vectors.dtype} of shape {vectors.shape}", "floats of shape (rows, dimensions)"
        raise bad_file(file.path, found, needed, "numbers would be misread")
    n, dimension = vectors.shape
    ids, start = _ids(file), 0
    while keys := list(islice(ids, file.rows)):
        end = start + len(keys)
        if end > n:
            break
        places = range(start + 1, end + 1)
        if dimension == file.dimension:
            yield SourceRows(places, keys, np.asarray(vectors[start:end], dtype=np.float32), {}, None)
        else:
            fault = _length_fault(dimension, file.dimension)
            zeros = np.zeros((len(keys), file.dimension), dtype=np.float32)
            yield SourceRows(places, keys, zeros, dict.fromkeys(range(len(keys)), fault), None)
        start = end
    if keys or start != n:
        found = f"{'more than' if keys else ''} {start + len(keys)} keys for {n} vectors".strip()
        danger = "from the first one missing, every vector would go to another row"
        raise bad_file(str(file.ids_file), found, "a key for each vector", danger)


def _mapped(path: Path) -> NDArray[Any]:
    """The array of an .npy file. Nothing is ever unpickled, since a pickle runs what it holds."""
    with path.open("rb") as content:
        magic = content.read(len(NPY_MAGIC))
    try:
        if magic != NPY_MAGIC:
            raise ValueError("another format: a pickle or an archive, perhaps; it was not opened")
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, RecursionError, tokenize.TokenError) as error:
        raise bad_file(path, " ".join(str(error).split()), "an .npy file", "nothing could be loaded") from error
    return array


def _ids(file: Wanted) -> Iterator[Any]:
    path = Path(str(file.ids_file))
    if path.suffix != ".npy":
        yield from (line.rstrip("\r\n") for line in lines_of(path))
        return
    ids = _mapped(path)
    if ids.ndim != 1:
        raise bad_file(path, f"keys of shape {ids.shape}", "a key for each vector", "rows cannot be told")
    for start in range(0, len(ids), file.rows):
        yield from ids[start : start + file.rows].tolist()


# A row of a text format: where it stands, its key, its vector or text of one, its text_hash, its text, its fault.
_Record = tuple[int, Any, Any, Any, Any, str]


def _json_lines(file: Wanted) -> Iterator[SourceRows]:
    stripped = ((place, line.rstrip()) for place, line in enumerate(lines_of(file.path), 1))
    numbered = ((place, line) for place, line in stripped if line)
    while batch := list(islice(numbered, file.rows)):
        places, lines = zip(*batch, strict=True)
        rows = _sound_objects(file, lines)
        if rows is not None:
            yield _rows_of(file, rows, places)
        else:
            yield from _from_records(file, (_record(file, place, line) for place, line in batch))


def _sound_objects(file: Wanted, lines: Sequence[str]) -> pa.RecordBatch | None:
    """The columns of these lines, read at once; None where a line must be looked at by itself."""
    others = [(name, pa.string()) for name in (HASH_COLUMN, TEXT_COLUMN) if name not in file.key]
    for kinds in product((pa.int64(), pa.string()), repeat=len(file.key)):
        schema = pa.schema([*zip(file.key, kinds, strict=True), (EMBEDDING_COLUMN, json_block.VECTOR), *others])
        if (found := json_block.objects(lines, schema)) is not None:
            given = [name for name, _ in others if found[name].null_count < len(lines)]
            return found.select([*file.key, EMBEDDING_COLUMN, *given])
    return None


def _record(file: Wanted, place: int, line: str) -> _Record:
    record, fault = read_json(line)
    if not fault and not isinstance(record, dict):
        fault = f"a JSON {type(record).__name__}, not an object"
    get = {}.get if fault else record.get
    of_row = _keys([[get(c)] for c in file.key])[0]
    return place, of_row, get(EMBEDDING_COLUMN), get(HASH_COLUMN), get(TEXT_COLUMN), fault


def read_json(text: str) -> tuple[Any, str]:
    """The value that a text holds, and what is wrong with it, empty if nothing is."""
    try:
        return json.loads(text), ""
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return None, "not JSON: too many brackets within each other"
    except ValueError:
        return None, "not JSON: a number of too many digits"


def _csv(file: Wanted) -> Iterator[SourceRows]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(lines_of(file.path, encoding="utf-8-sig", newline=""))
    header = next(reader, [])
    _check_columns(file, header)
    at = [header.index(c) if c in header else -1 for c in (EMBEDDING_COLUMN, HASH_COLUMN, TEXT_COLUMN)]
    of_key = [header.index(c) for c in file.key]

    def records() -> Iterator[_Record]:
        for row in reader:
            if len(row) == len(header):
                vector, text_hash, text = (row[i] if i >= 0 else None for i in at)
                of_row = _keys([[row[i] or None] for i in of_key])[0]
                yield reader.line_num, of_row, vector, text_hash, text, ""
            elif row:
                fault = f"{len(row)} fields, {len(header)} needed"
                yield reader.line_num, None, None, None, None, fault

    yield from _from_records(file, records())


def _from_records(file: Wanted, records: Iterator[_Record]) -> Iterator[SourceRows]:
    while batch := list(islice(records, file.rows)):
        places, keys, values, hashes, texts, row_faults = map(list, zip(*batch, strict=True))
        vectors, faults = stack(values, file.dimension)
        faults |= {i: fault for i, fault in enumerate(row_faults) if fault}
        given = [column if any(v is not None for v in column) else None for column in (hashes, texts)]
        yield SourceRows(places, keys, vectors, faults, _hashes(given[0], given[1], faults))


def as_array(value: Any) -> NDArray[Any]:
    """A vector of the database as numpy has it; pgvector gives some as an object of its own."""
    return np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)


def stack(values: Sequence[object], dimension: int) -> tuple[Vectors, dict[int, str]]:
    """Vectors as lists, arrays or text ('[1,2]') to one array of shape (n, dimension), and what is wrong by index."""
    texts = [_as_json(v) if isinstance(v, str) else v for v in values]
    if all(isinstance(v, str | None) for v in texts):
        column = json_block.vectors(texts)  # type: ignore[arg-type]
        if column is not None:
            return _arrow_vectors(column, dimension)
    if all(isinstance(v, np.ndarray) and v.shape == (dimension,) and v.dtype.kind == "f" for v in texts):
        return np.stack(texts).astype(np.float32, copy=False), {}  # type: ignore[arg-type]
    return _stack_each([read_json(v)[0] if isinstance(v, str) else v for v in texts], dimension)


def _stack_each(values: Sequence[object], dimension: int) -> tuple[Vectors, dict[int, str]]:
    vectors = np.zeros((len(values), dimension), dtype=np.float32)
    faults: dict[int, str] = {}
    for i, value in enumerate(values):
        if not isinstance(value, list | np.ndarray):
            faults[i] = _length_fault(-1, dimension)
        elif len(value) != dimension:
            faults[i] = _length_fault(len(value), dimension)
        else:
            try:
                with np.errstate(over="ignore"):
                    vectors[i] = value
            except (TypeError, ValueError, OverflowError):
                faults[i] = "something other than a number among its numbers"
    return vectors, faults


def _as_json(text: str) -> str:
    """JSON, pgvector's own notation, or an array as PostgreSQL writes it."""
    return text.strip().replace("{", "[").replace("}", "]")


def _hashes(
    hashes: Sequence[Any] | None, texts: Sequence[Any] | None, faults: dict[int, str]
) -> list[bytes | None] | None:
    """Hashes as the table's rows have them; one that cannot be read is a fault of its row."""
    if hashes is None and texts is None:
        return None
    if hashes is None:
        for i, text in enumerate(texts or ()):
            if text is not None and (why := unsound(text) if isinstance(text, str) else "no text"):
                faults[i] = f"its text: {why}"
        return [None if t is None or i in faults else hash_of(t) for i, t in enumerate(texts or ())]
    result: list[bytes | None] = []
    for i, value in enumerate(hashes):
        if isinstance(value, str):
            with suppress(ValueError):
                value = bytes.fromhex(value.removeprefix("\\x"))
        # Of a number, bytes() would make as many zeros.
        raw = value if isinstance(value, bytes) else b""
        if len(raw) < HASH_BYTES:
            faults.setdefault(i, f"{HASH_COLUMN} is not the hex of {HASH_BYTES} bytes")
        result.append(raw[:HASH_BYTES])
    return result


def hash_of(text: str) -> bytes:
    """The hash that the database makes of the same text; see ``{text_hash}`` in :mod:`runbook_lib.core.names`."""
    return hashlib.sha256(text.encode()).digest()[:HASH_BYTES]


def key_reader(*key_types: str) -> Callable[[Any], Any]:
    """A function from a key as a file has it to a key of these types; it raises ValueError for what is none.

    One of several columns comes as their values, or as the text of a JSON list of them.
    """
    if len(key_types) == 1:
        return _column_reader(key_types[0])
    columns = key_columns(*key_types)
    return lambda given: key.text_of(columns(given if isinstance(given, str) else key.text_of(given)))


def key_columns(*key_types: str) -> Callable[[Any], tuple[Any, ...]]:
    """A function from a key to the values of its columns; it raises ValueError for what is no key."""
    if len(key_types) == 1:
        return lambda value: (value,)
    readers = [_column_reader(kind) for kind in key_types]

    def columns(text: str) -> tuple[Any, ...]:
        return tuple(read(value) for read, value in zip(readers, key.values_of(text), strict=True))

    return columns


def shown_key(given: Any) -> str:
    """A key as a file has it, whether it can be read or not."""
    return key.text_of(given) if isinstance(given, tuple) else str(given)


def _column_reader(key_type: str) -> Callable[[Any], Any]:
    if key_type in INTEGERS:
        limit = INTEGERS[key_type]

        def whole(value: Any) -> int:
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise ValueError(f"not a {key_type}")
            number = int(value)
            if not -limit <= number < limit:
                raise ValueError(f"out of the range of {key_type}")
            return number

        return whole
    if key_type == "uuid":
        return lambda value: value if isinstance(value, uuid.UUID) else _uuid(value)
    return _text_key


def _uuid(value: Any) -> uuid.UUID:
    if isinstance(value, bytes) and len(value) == 16:
        return uuid.UUID(bytes=value)
    return uuid.UUID(str(value))


def _text_key(value: Any) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool) or unsound(str(value)):
        raise ValueError("not a text")
    return str(value)


def read_at_once(key_types: Sequence[str], values: list[Any]) -> list[Any] | None:
    """These keys as keys of these types; None unless all are, each once: then :func:`key_reader` says of each."""
    kinds, key_type = set(map(type, values)), key_types[0]
    try:
        if len(key_types) > 1:
            keys, sound = list[Any](map(key_reader(*key_types), values)), True
        elif key_type in INTEGERS and kinds <= {int, str}:
            limit, keys = INTEGERS[key_type], list(map(int, values))
            sound = not keys or (-limit <= min(keys) and max(keys) < limit)
        elif key_type in INTEGERS or key_type == "uuid":
            keys, sound = list(map(key_reader(key_type), values)), True
        else:
            keys, sound = list(map(str, values)), kinds <= {int, str} and not unsound("".join(map(str, values)))
    except ValueError:
        return None
    return keys if sound and len(set(keys)) == len(keys) else None


def query_vectors(path: Path, dimension: int, wanted_ids: Sequence[str]) -> Vectors:
    """Vectors of these queries from a file of ``query_id`` and ``embedding``, in the order of the ids.

    Raises BadInput where one is missing, twice there, or of another dimension.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind in (None, "npy"):
        raise bad_file(
            path, f"suffix {path.suffix or 'none'}", "Parquet, Arrow, JSON lines or CSV", "it was not read"
        )
    found: dict[str, NDArray[np.float32]] = {}
    asked = set(wanted_ids)
    for rows in read(Wanted(path, str(kind), ("query_id",), dimension, 1000)):
        for i, (place, query_id) in enumerate(zip(rows.places, map(str, rows.keys), strict=True)):
            if i in rows.faults or query_id in found or not np.isfinite(rows.vectors[i]).all():
                again = "query_id again" if query_id in found else "NaN or infinity among its numbers"
                what = f"row {place}, query_id {query_id}: {rows.faults.get(i, again)}"
                raise bad_file(
                    path, what, f"one vector of {dimension} dimensions a query", "recall would be of noise"
                )
            if query_id in asked:
                found[query_id] = rows.vectors[i]
    missing = [q for q in wanted_ids if q not in found]
    if missing:
        some = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        danger = "these queries could not be asked of the index"
        raise bad_file(path, f"no vector for {len(missing)} queries: {some}", "one for each query", danger)
    return np.stack([found[q] for q in wanted_ids]) if wanted_ids else np.zeros((0, dimension), dtype=np.float32)
