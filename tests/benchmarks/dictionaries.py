"""Real text for the benchmarks: WordNet's glosses as rows, another dictionary's definitions as queries.

Debian's packages wordnet-base and dict-gcide hold them: apt-get install wordnet-base dict-gcide
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

FOLDER = Path(os.environ.get("RUNBOOK_DICTIONARIES", "/usr/share"))
WORDNET, GCIDE = FOLDER / "wordnet", FOLDER / "dictd" / "gcide.dict.dz"
PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
DIMENSION = 256

needed = pytest.mark.skipif(
    not (WORDNET.is_dir() and GCIDE.is_file()),
    reason=f"no dictionaries in {FOLDER}: apt-get install wordnet-base dict-gcide, or set RUNBOOK_DICTIONARIES",
)


def glosses() -> Iterator[tuple[str, str, str, str]]:
    """Words, gloss, part of speech, and WordNet's number of the subject (plants, persons, motion, …)."""
    for suffix, part in PARTS.items():
        for line in (WORDNET / f"data.{suffix}").read_text("utf-8").splitlines():
            if line.startswith("  "):
                continue
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            yield ", ".join(words), gloss.strip(), part, fields[1]


def definitions(n: int) -> list[str]:
    """The first n definitions of a hundred letters and more, spread over the dictionary."""
    text = gzip.decompress(GCIDE.read_bytes()).decode("utf-8", "replace")
    found = [" ".join(x.split()) for x in re.split(r"\n\n", text)]
    found = [re.sub(r"\[[^\]]*\]|\{|\}", "", x) for x in found if 100 <= len(x) <= 400]
    return found[:: max(1, len(found) // n)][:n]


def create(connection: psycopg.Connection[Any]) -> int:
    """Table public.glosses with its filters: part of speech, subject, first letter; returns its rows."""
    connection.execute(
        "CREATE EXTENSION IF NOT EXISTS pg_trgm;"
        "CREATE TABLE glosses (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, words text, gloss text,"
        " part text, subject text, letter text GENERATED ALWAYS AS (lower(left(words, 1))) STORED)"
    )
    rows = 0
    with connection.cursor() as cursor, cursor.copy("COPY glosses (words, gloss, part, subject) FROM STDIN") as copy:
        for row in glosses():
            copy.write_row(row)
            rows += 1
    for column in ("part", "subject", "letter"):
        connection.execute(f"CREATE INDEX ON glosses ({column})")
    connection.execute("VACUUM ANALYZE glosses")
    return rows


def params(folder: Path, dsn_env: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """The content of a params file for the table; writes its queries into the folder."""
    with (folder / "queries.jsonl").open("w") as file:
        for i, text in enumerate(definitions(1000)):
            file.write(json.dumps({"query_id": f"q{i}", "text": text}) + "\n")
    data: dict[str, Any] = {
        "connection": {"dsn_env": dsn_env},
        "target": {
            "name": "glosses", "table": "glosses", "key": "id", "text_columns": ["words", "gloss"],
            "filters": ["part", "subject", "letter"],
        },
        "vector": {"dimension": DIMENSION},
        "embeddings": {"source": "wordllama", "batch_rows": 10_000},
        "legacy": {"query": "SELECT id FROM glosses WHERE gloss ILIKE '%' || :query || '%' ORDER BY id LIMIT :k"},
        "queries": {"file": "queries.jsonl"},
        "index": {"maintenance_work_mem_mb": 512},
        "backfill": {"batch_rows": 20_000},
    }  # fmt: skip
    return {name: data.get(name, {}) | sections.get(name, {}) for name in {**data, **sections}}
