"""Real data for the demo: MITRE's Common Weakness Enumeration as articles, with judged queries.

CWE is Copyright © 2006–2022, The MITRE Corporation, used under its Terms of Use, which travel in the package
``cwe2`` that carries the catalogue. The notice is put on the table as its comment.

Each weakness is an article. The analysts' notes on real vulnerabilities ("Observed_Examples") are the queries; the
weaknesses that a note is filed under are its right answers. The notes are no part of any article.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.sql import load as load_sql

SQL = load_sql("demo")
MARK = "Demo data of the pgvector runbook; `runbook demo` drops this schema and creates it again."

CATALOGUE = files("cwe2").joinpath("database_v49")
CWE = "{http://cwe.mitre.org/cwe-7}"
LINES_OF_THEIR_OWN = {"p", "li", "div", "br", "tr"}
IDENTIFIER = re.compile(r"\b(?:CWE|CVE)-\d[\d-]*", re.IGNORECASE)
LEAST_WORDS_OF_A_QUERY = 5

# Where the catalogue names no day; the day of its release.
RELEASED = "2024-02-29"
FIRST_PASSAGE_ID = 1_000_001
LEAST_WORDS_OF_A_PASSAGE = 8
# About the length of an article, so that a grown table costs and matches like a larger one of its kind.
LONGEST_PASSAGE_CHARACTERS = 1200
# Section of a weakness, and where in it the passages stand. Observed_Examples are missing here on purpose.
PASSAGES = {
    "Mitigation": "Potential_Mitigations/Mitigation/Description",
    "Mitigation effectiveness": "Potential_Mitigations/Mitigation/Effectiveness_Notes",
    "Consequence": "Common_Consequences/Consequence/Note",
    "Introduction": "Modes_Of_Introduction/Introduction/Note",
    "Background": "Background_Details/Background_Detail",
    "Detection": "Detection_Methods/Detection_Method/Description",
    "Demonstration": "Demonstrative_Examples/Demonstrative_Example/Intro_Text",
    "Demonstration explained": "Demonstrative_Examples/Demonstrative_Example/Body_Text",
    "Alternate term": "Alternate_Terms/Alternate_Term/Description",
    "Note": "Notes/Note",
}


@dataclass(frozen=True)
class DemoData:
    """What was loaded: counts of rows and lines."""

    articles: int
    passages: int
    queries: int
    judgements: int

    @property
    def rows(self) -> int:
        return self.articles + self.passages


class Article(NamedTuple):
    """A row of demo.articles."""

    id: int
    title: str
    body: str
    status: str
    category: str
    created_at: str


def create_database(server: str) -> str:
    """Makes database ``demo`` on this server, PostgreSQL 17 or newer; returns its DSN."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(SQL["create_database"].compose({"database": sql.Identifier("demo")}))
    return make_conninfo(server, dbname="demo")


def load(dsn: str, folder: Path, grow_to_rows: int = 0) -> DemoData:
    """Makes schema ``demo`` from nothing, and ``queries.jsonl`` and ``judgements.jsonl`` in the folder.

    grow_to_rows: add real passages without judgements until the table has so many rows; 0 adds none. A passage that
    answers a query counts as wrong, and passages are shorter than articles: measures of relevance fall, least for a
    search that favours long texts. Grow the table to measure time and size; judge searches on it as it is.

    Raises BadInput where a schema ``demo`` exists that this function did not make, and where there is not enough
    real text to grow so far; the database is left as it was.
    """
    weaknesses = _weaknesses()
    articles = [_article(w) for w in weaknesses]
    queries = _queries(weaknesses)
    passages = list(islice(_passages(weaknesses, set(queries)), max(0, grow_to_rows - len(articles))))
    if grow_to_rows > len(articles) + len(passages):
        raise BadInput([_too_little_text(grow_to_rows, len(articles) + len(passages))])

    with psycopg.connect(dsn, autocommit=True) as connection:
        _refuse_a_schema_of_others(connection)
        notice = CATALOGUE.joinpath("cwe.NOTICE").read_text("utf-8").strip()
        values: dict[str, sql.Composable] = {"mark": sql.Literal(MARK), "notice": sql.Literal(notice)}
        with connection.transaction():
            for name in ("drop_schema", "create_extensions", "create_schema", "create_table"):
                connection.execute(SQL[name].compose(values))
            with connection.cursor().copy(SQL["copy"].compose({})) as copy:
                for row in chain(articles, passages):
                    copy.write_row(row)
            connection.execute(SQL["create_indexes"].compose({}))
        connection.execute(SQL["vacuum"].compose({}))

    judgements = [(_query_id(text), key) for text, keys in queries.items() for key in keys]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "queries.jsonl", ({"query_id": _query_id(t), "text": t} for t in queries))
    _write(folder / "judgements.jsonl", ({"query_id": q, "key": str(key), "relevance": 1} for q, key in judgements))
    return DemoData(len(articles), len(passages), len(queries), len(judgements))


def _weaknesses() -> list[ET.Element]:
    catalogue = ET.fromstring(CATALOGUE.joinpath("cwec_v4.14.xml").read_bytes())  # noqa: S314 from a pinned package
    return [w for w in catalogue.iterfind(f"{CWE}Weaknesses/{CWE}Weakness") if w.get("Status") != "Deprecated"]


def _article(weakness: ET.Element) -> Article:
    parts = (_text(e) for name in ("Description", "Extended_Description") for e in weakness.iterfind(CWE + name))
    return Article(
        int(weakness.attrib["ID"]),
        weakness.attrib["Name"],
        "\n".join(filter(None, parts)),
        weakness.attrib["Status"],
        weakness.attrib["Abstraction"],
        weakness.findtext(_path("Content_History/Submission/Submission_Date")) or RELEASED,
    )


def _queries(weaknesses: Iterable[ET.Element]) -> dict[str, list[int]]:
    """Query text -> ids of the weaknesses that it illustrates, both in the order of the catalogue."""
    found: dict[str, list[int]] = {}
    for weakness in weaknesses:
        key = int(weakness.attrib["ID"])
        for example in weakness.iterfind(_path("Observed_Examples/Observed_Example/Description")):
            text = _without_identifiers(_text(example))
            if len(re.findall(r"\w+", text)) >= LEAST_WORDS_OF_A_QUERY and key not in found.setdefault(text, []):
                found[text].append(key)
    return found


def _without_identifiers(text: str) -> str:
    """The text without CWE and CVE numbers, which would give the answer away, and without what held them."""
    text = IDENTIFIER.sub(" ", text)
    text = re.sub(r"[(\[][\s,;:/&-]*[)\]]", " ", text)
    return re.sub(r"\s+([.,;:)])", r"\1", " ".join(text.split())).strip()


def _query_id(text: str) -> str:
    return "q" + hashlib.sha256(text.encode()).hexdigest()[:12]


def _passages(weaknesses: Iterable[ET.Element], queries: set[str]) -> Iterator[Article]:
    """Real passages without judgements, each text once: of the catalogue first, then of Python's documentation."""
    seen = set(queries)
    key = FIRST_PASSAGE_ID
    for title, body, section, created_at in chain(_catalogue_passages(weaknesses), _python_passages()):
        if body not in seen and len(body.split()) >= LEAST_WORDS_OF_A_PASSAGE:
            seen.add(body)
            yield Article(key, title, body, "Passage", section, created_at)
            key += 1


def _catalogue_passages(weaknesses: Iterable[ET.Element]) -> Iterator[tuple[str, str, str, str]]:
    for weakness in weaknesses:
        name, created_at = weakness.attrib["Name"], _article(weakness).created_at
        for section, path in PASSAGES.items():
            for element in weakness.iterfind(_path(path)):
                for body in _windows(_text(element)):
                    yield f"{section}: {name}", body, section, created_at


def _python_passages() -> Iterator[tuple[str, str, str, str]]:
    """Docstrings of the standard library, then of the installed packages; read, never imported."""
    for place, section in (("stdlib", "Python standard library"), ("purelib", "Python package")):
        root = Path(sysconfig.get_path(place))
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if place == "stdlib" and (parts[0] == "site-packages" or parts[0] == "dist-packages"):
                continue
            module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            for name, text in _docstrings(path):
                for body in _windows(text):
                    yield f"{module}{name}", body, section, RELEASED


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of somebody else's code, and never run
            tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, ValueError):
        return  # test data of a package: broken on purpose, or not UTF-8
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and "\0" not in text:  # which PostgreSQL cannot store
                yield ("" if isinstance(node, ast.Module) else f".{node.name}"), text


def _windows(text: str) -> Iterator[str]:
    """Whole paragraphs, as many as fit into one passage; a longer paragraph is cut at a word."""
    window = ""
    for paragraph in filter(None, (" ".join(p.split()) for p in re.split(r"\n\s*\n|\n(?=[A-Z])", text))):
        while len(paragraph) > LONGEST_PASSAGE_CHARACTERS:
            cut = paragraph.rfind(" ", 0, LONGEST_PASSAGE_CHARACTERS)
            cut = cut if cut > 0 else LONGEST_PASSAGE_CHARACTERS
            if window:
                yield window
                window = ""
            yield paragraph[:cut]
            paragraph = paragraph[cut:].lstrip()
        if window and len(window) + len(paragraph) >= LONGEST_PASSAGE_CHARACTERS:
            yield window
            window = ""
        window = f"{window}\n{paragraph}" if window else paragraph
    if window:
        yield window


def _path(path: str) -> str:
    return "/".join(CWE + part for part in path.split("/"))


def _text(element: ET.Element) -> str:
    """Plain text of an element with XHTML in it: one line a paragraph or list item, without empty lines."""

    def pieces(e: ET.Element) -> Iterator[str]:
        alone = e.tag.rpartition("}")[2] in LINES_OF_THEIR_OWN
        yield "\n" if alone else ""
        # Line breaks of the source are layout; those that count come from the tags.
        yield (e.text or "").replace("\n", " ")
        for child in e:
            yield from pieces(child)
            yield (child.tail or "").replace("\n", " ")
        yield "\n" if alone else ""

    lines = (" ".join(line.split()) for line in "".join(pieces(element)).split("\n"))
    return "\n".join(filter(None, lines))


def _write(path: Path, records: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")


def _refuse_a_schema_of_others(connection: psycopg.Connection[tuple[str]]) -> None:
    row = connection.execute(SQL["owner"].compose({})).fetchone()
    if row is not None and row[0] != MARK:
        raise BadInput(
            [
                Gate(
                    "demo.schema_is_ours",
                    Verdict.FAIL,
                    f"schema demo in database {connection.info.dbname}",
                    "a schema demo that the runbook did not make",
                    "no schema demo, or the one that `runbook demo` made",
                    "loading the demo drops the schema with all that is in it; nothing was changed",
                    "load the demo into a database of its own",
                )
            ]
        )


def _too_little_text(wanted: int, there: int) -> Gate:
    return Gate(
        "demo.text_suffices",
        Verdict.FAIL,
        "grow_to_rows",
        f"{there} rows' worth of real text in the catalogue and the Python {sys.version_info.major} installation",
        f"{wanted} rows",
        "repeated or invented text would make every measure worthless; nothing was loaded",
        f"ask for at most {there} rows",
    )
