"""Rows of the staging table in PostgreSQL's binary COPY format, packed by numpy.

psycopg's ``write_row`` makes each row in Python; packing whole batches was measured at 0.5 to 0.65 of its time and a
quarter of its client CPU (``tests/benchmarks/bench_load.py``). It needs rows of one width: keys of fixed size.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runbook_lib.core.names import HASH_BYTES
from runbook_lib.embeddings.sources import Vectors

# PostgreSQL manual, COPY, "Binary Format": signature, flags, length of the extension; and the trailer.
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
# Keys of fixed width: format in network byte order.
KEYS = {"smallint": ">i2", "integer": ">i4", "bigint": ">i8", "uuid": "V16"}
NUMBERS = {"vector": ">f4", "halfvec": ">f2"}


def can_pack(key_types: Sequence[str]) -> bool:
    """Are keys of these types one column, and all of one width?"""
    return len(key_types) == 1 and key_types[0] in KEYS


def pack(
    keys: Sequence[Any], hashes: Sequence[bytes], vectors: Vectors, key_type: str, vector_type: str
) -> NDArray[Any]:
    """Rows (key, text_hash, embedding) as one array, whose bytes are what COPY reads between header and trailer.

    A vector is sent as its dimension, an unused field, and its numbers: ``vector_send`` in pgvector's vector.c.
    """
    key, number = np.dtype(KEYS[key_type]), np.dtype(NUMBERS[vector_type])
    dimension = vectors.shape[1]
    row = np.dtype(
        [
            ("fields", ">i2"),
            ("key_bytes", ">i4"),
            ("key", key),
            ("hash_bytes", ">i4"),
            ("hash", f"V{HASH_BYTES}"),
            ("vector_bytes", ">i4"),
            ("dimension", ">i2"),
            ("unused", ">i2"),
            ("numbers", number, (dimension,)),
        ]
    )
    rows = np.zeros(len(keys), row)
    rows["fields"] = 3
    rows["key_bytes"], rows["key"] = key.itemsize, _as_array(keys, key)
    rows["hash_bytes"], rows["hash"] = HASH_BYTES, np.frombuffer(b"".join(hashes), dtype=f"V{HASH_BYTES}")
    rows["vector_bytes"] = 4 + dimension * number.itemsize
    rows["dimension"], rows["numbers"] = dimension, vectors
    return rows


def _as_array(keys: Sequence[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    if kind.kind != "V":
        return np.asarray(keys, dtype=kind)
    return np.frombuffer(b"".join(uuid.UUID(str(k)).bytes if isinstance(k, str) else k.bytes for k in keys), kind)
