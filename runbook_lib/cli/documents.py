"""What the documents take from the code: parameters, locks, exit codes, operations, and the attacks that tests try.

``python -m runbook_lib.cli.documents`` writes it between the marks ``<!-- made: NAME -->`` and ``<!-- end -->`` of
README and ``docs/``, and into the notebooks' tables of changes; a test compares.
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from runbook_lib.core.db import BLOCKED_BY, lock_level
from runbook_lib.core.registry import OPERATE, STEPS, notebook, rollback_of, short
from runbook_lib.params import Params, reference
from runbook_lib.runner.manifest import EXIT_CODES, MEANINGS
from runbook_lib.sql import Block, load

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/*.md")
MADE = re.compile(r"(?<=<!-- made: )(\w+)( -->\n).*?(?=<!-- end -->)", re.S)
NOT_OF_THE_RUNBOOK = {"demo"}
OWN = re.compile(
    r"on (the queue|the staging table|the table of refused vectors|the runbook's own)|none on the target"
)
MARK = "pytest.mark.attack"
# A row of a notebook's table of changes: a condition, in italics; what happens; the statements that do it. The author
# names the statements, the rest is made; a row that names none is all the author's.
CHANGE = re.compile(r"^\| (\*[^*|]+\* )?[^|]*\((`[a-z_]+\.[a-z_]+`(?:, `[a-z_]+\.[a-z_]+`)*)\) \|.*$", re.M)
# What a lock waits for where its statement says nothing else.
WAITS_FOR = {
    "ACCESS EXCLUSIVE": "open transactions on it, in short tries",
    "SHARE ROW EXCLUSIVE": "open writes on it, in short tries",
    "SHARE": "open writes on it, in short tries",
    "SHARE UPDATE EXCLUSIVE": "vacuum and DDL of it, in short tries",
    "ROW EXCLUSIVE": "locked rows, in short tries",
    "": "nothing",
}


def pages() -> list[Path]:
    """The pages that may hold a part made from the code."""
    return [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]


def filled(text: str) -> str:
    """A page with its made parts as the code has them now."""
    return MADE.sub(lambda mark: mark[1] + mark[2] + PARTS[mark[1]]() + "\n", text)


def parameters() -> str:
    """A heading a section, a line a key, in the order of the model."""
    lines: list[str] = []
    section = ""
    for key, kind, default, what in reference.rows():
        name, _, rest = key.partition(".")
        if name != section:
            section = name
            about = (Params.model_fields[name].annotation.__doc__ or "").strip()
            lines += ["", f"### {name}", "", about, ""]
        lines.append(f"- {_as_written(rest, kind, default)}: {what}")
    return "\n".join(lines[1:])


def _as_written(key: str, kind: str, default: str) -> str:
    """A key with its default, as YAML has it, which tells the type; the type where there is none, or a choice."""
    choice = f" (`{kind}`)" if "|" in kind and kind != "true|false" else ""
    if default == "required":
        return f"`{key}` ({kind}, required)"
    if default in ("null", "[]", "{}"):
        return f"`{key}`{choice or f' ({kind})'}"
    return f"`{key}: {default}`{choice}".replace('"', "")


def locks() -> str:
    """The statements that others may have to wait for, by what their SQL files declare, the strongest lock first."""
    lines: list[str] = []
    blocks = list(locking())
    for level, blocked in BLOCKED_BY.items():
        where: dict[str, list[str]] = defaultdict(list)
        for block in blocks:
            if lock_level(block.lock) == level:
                where[_place(block.lock.removeprefix(level))].append(f"`{block.name}`")
        if where:
            lines += ["", f"**{level}** blocks {blocked}.", ""]
            lines += [f"- {place}: {', '.join(names)}" for place, names in where.items()]
    return "\n".join(lines[1:])


def locking() -> Iterator[Block]:
    """The blocks that lock something of the user's: not those that write only the runbook's own tables."""
    folder = files("runbook_lib.sql")
    modules = sorted(Path(str(f)).stem for f in folder.iterdir() if str(f).endswith(".sql"))
    for module in modules:
        if module not in NOT_OF_THE_RUNBOOK:
            yield from (b for b in load(module).values() if lock_level(b.lock) and not OWN.search(b.lock))


def exit_codes() -> str:
    """A row an exit code, with the statuses that a record shows for it."""
    lines = ["| code | status | meaning | what a scheduler does |", "|---|---|---|---|"]
    for code, (meaning, reaction) in MEANINGS.items():
        statuses = ", ".join(status for status, its_code in EXIT_CODES.items() if its_code == code)
        lines.append(f"| {code} | {statuses or '–'} | {meaning} | {reaction} |")
    return "\n".join(lines)


def operations() -> str:
    """A row an operation."""
    lines = ["| operation | what it does | needs | `--undo` |", "|---|---|---|---|"]
    for step in (STEPS[name] for name in OPERATE):
        undone = "yes" if rollback_of(step.name) else "no"
        lines.append(f"| `{short(step.name)}` | {step.does[:1].upper()}{step.does[1:]} | `{step.needs}` | {undone} |")
    return "\n".join(lines)


def attacks() -> str:
    """How many tests are marked as attacks."""
    count = 0
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            count += isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == MARK for d in node.decorator_list)
    return f"{count} tests try an attack and fail if it succeeds (`pytest -m attack`)."


def _place(text: str) -> str:
    """What is locked, and for how long, with the names of the target in words; without the reasons."""
    words = {
        "table": "the table",
        "part": "the table",
        "vectors": "the vectors' table",
        "relation": "the table or partition",
    }
    place = re.split(r";|, (?:since|while) ", text.strip())[0]
    return re.sub(r"\{(\w+)\}", lambda m: words.get(m[1], f"the {m[1].replace('_', ' ')}"), place)


def notebook_filled(step: str, text: str) -> str:
    """A step's notebook, as JSON, with the rows of its table of changes as the SQL files have them now."""
    stored = json.loads(text)
    for cell in stored["cells"]:
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"])
            made = CHANGE.sub(lambda row: _change(step, row[1] or "", re.findall(r"[\w.]+", row[2])), source)
            cell["source"] = made.splitlines(keepends=True)
    return json.dumps(stored, indent=1, ensure_ascii=False) + "\n"


def _change(step: str, condition: str, statements: list[str]) -> str:
    """A row of a table of changes: the first statement says what happens, and under which lock."""
    block = _block(step, statements[0])
    names = ", ".join(f"`{s}`" for s in statements)
    what = re.split(r"\. ", block.purpose)[0].removesuffix(".")
    cells = [f"{condition}{what} ({names})", *_lock_cells(block.lock), _rolled_back_by(step, block.undo)]
    return f"| {' | '.join(cells)} |"


def _lock_cells(lock: str) -> tuple[str, str, str]:
    """Lock, whom it blocks, what it waits for."""
    level = "" if OWN.search(lock) else lock_level(lock)
    waits = re.search(r"it waits for ([^;]+)", lock)
    return (
        f"{level} {_place(lock.removeprefix(level))}".strip() or "none",
        BLOCKED_BY.get(level, "nobody"),
        waits[1] if waits else WAITS_FOR[level],
    )


def _block(step: str, statement: str) -> Block:
    module, _, name = statement.partition(".")
    try:
        return load(module)[name]
    except (KeyError, FileNotFoundError):
        raise SystemExit(
            f"notebooks/{notebook(step)}: no statement is called {statement}; correct its table"
        ) from None


def _rolled_back_by(step: str, undo: str) -> str:
    """The step that rolls a change back, or why there is none; of a rollback, the steps to run again."""
    if undo.startswith(("none", "its own")):
        return undo
    if again := STEPS[step].rolls_back:
        return f"run {', '.join(f'`{name}`' for name in reversed(again))} again"
    rollback = next((s.name for s in STEPS.values() if step in s.rolls_back), "")
    return f"`{rollback}`" if rollback else STEPS[step].no_rollback


PARTS = {
    "parameters": parameters,
    "locks": locks,
    "exit_codes": exit_codes,
    "operations": operations,
    "attacks": attacks,
}


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    for name in STEPS:
        path = ROOT / "notebooks" / notebook(name)
        path.write_text(notebook_filled(name, path.read_text("utf-8")), "utf-8")
