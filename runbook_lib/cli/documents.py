"""The documents that are made from the code: parameters, locks, and the attacks that its tests try.

``python -m runbook_lib.cli.documents``.

A test compares them with the files in ``docs/``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from runbook_lib.core.db import BLOCKED_BY
from runbook_lib.params import Params, reference
from runbook_lib.sql import load

MADE = "<!-- Made by `python -m runbook_lib.cli.documents`; changes here are lost. -->"
# The strongest first, so that "SHARE" is not found inside "SHARE ROW EXCLUSIVE".
LEVEL = re.compile("|".join(sorted(BLOCKED_BY, key=len, reverse=True)))
NOT_OF_THE_RUNBOOK = {"demo"}
TESTS = Path(__file__).parents[2] / "tests"
MARK = "pytest.mark.attack"


def parameters() -> str:
    """``docs/parameters.md``: a table a section, in the order of the model."""
    lines = [
        "# Parameters",
        "",
        MADE,
        "",
        "One YAML file a target. An unknown key, a wrong type or a value out of range is refused before anything"
        " starts. Units stand in the names. Paths are relative to the file. Secrets are named, never written:"
        " an environment variable, a service of `pg_service.conf`, a password file.",
    ]
    section = ""
    for key, kind, default, what in reference.rows():
        name, _, rest = key.partition(".")
        if name != section:
            section = name
            about = (Params.model_fields[name].annotation.__doc__ or "").strip()
            lines += ["", f"## {name}", "", about, "", "| key | type | default | what it is |", "|---|---|---|---|"]
        lines.append(f"| `{rest}` | {_cell(kind)} | {_cell(default)} | {_cell(what)} |")
    return "\n".join(lines) + "\n"


def locks() -> str:
    """``docs/locks.md``: every statement that takes a lock somebody may wait for, as the SQL files declare it."""
    lines = [
        "# Locks",
        "",
        MADE,
        "",
        "Every statement of the runbook that takes more than a reader's lock, from `runbook_lib/sql/`. A notebook"
        " shows the same lines beside the statement itself before it is carried out.",
        "",
        "| statement | what for | lock | it blocks | taken back by |",
        "|---|---|---|---|---|",
    ]
    for name, purpose, lock, undo in _locking():
        found = LEVEL.match(lock)
        blocks = BLOCKED_BY[found[0]] if found else "nobody"
        lines.append(f"| `{name}` | {_cell(purpose)} | {_cell(lock)} | {blocks} | {_cell(undo)} |")
    return "\n".join(lines) + "\n"


def _locking() -> Iterator[tuple[str, str, str, str]]:
    folder = files("runbook_lib.sql")
    modules = sorted(Path(str(f)).stem for f in folder.iterdir() if str(f).endswith(".sql"))
    for module in modules:
        for block in load(module).values() if module not in NOT_OF_THE_RUNBOOK else ():
            if LEVEL.match(block.lock):
                yield block.name, block.purpose, _plain(block.lock), _plain(block.undo)


def attacks() -> str:
    """``docs/attacks.md``: a line a test that is marked as an attack. Its name says what held."""
    lines = [
        "# Attacks tried, and what held",
        "",
        MADE,
        "",
        "Each line is the name of a test marked `attack`: it tries what somebody might who means harm, and fails if"
        " it succeeds. All of them: `pytest -m attack`. What they rest on, and what is not protected:"
        " [security](security.md).",
        "",
        "| what held | tried in |",
        "|---|---|",
    ]
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == MARK for d in node.decorator_list):
                words = node.name.removeprefix("test_").replace("_", " ")
                where = path.relative_to(TESTS.parent)
                lines.append(f"| {words[0].upper()}{words[1:]} | `{where}` |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Names of the target in words."""
    words = {"table": "the table", "vectors": "the table that holds the vectors"}
    return re.sub(r"\{(\w+)\}", lambda m: words.get(m[1], f"the {m[1].replace('_', ' ')}"), text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


DOCUMENTS = {"parameters.md": parameters, "locks.md": locks, "attacks.md": attacks}


def write(folder: Path) -> None:
    """Writes the documents into the folder."""
    for name, make in DOCUMENTS.items():
        (folder / name).write_text(make(), "utf-8")


if __name__ == "__main__":
    write(TESTS.parent / "docs")
