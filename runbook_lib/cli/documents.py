"""What the documents take from the code: parameters, locks, exit codes, operations, and the attacks that tests try.

``python -m runbook_lib.cli.documents`` writes it between the marks ``<!-- made: NAME -->`` and ``<!-- end -->`` of
README and ``docs/``; a test compares.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from runbook_lib.core.db import BLOCKED_BY, lock_level
from runbook_lib.core.registry import OPERATE, STEPS, rollback_of, short
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
    blocks = list(_locking())
    for level, blocked in BLOCKED_BY.items():
        where: dict[str, list[str]] = defaultdict(list)
        for block in blocks:
            if lock_level(block.lock) == level:
                where[_place(block.lock.removeprefix(level))].append(f"`{block.name}`")
        if where:
            lines += ["", f"**{level}** blocks {blocked}.", ""]
            lines += [f"- {place}: {', '.join(names)}" for place, names in where.items()]
    return "\n".join(lines[1:])


def _locking() -> Iterator[Block]:
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
    """How many tests are marked as attacks, by file."""
    count: Counter[str] = Counter()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == MARK for d in node.decorator_list):
                count[path.stem.removeprefix("test_")] += 1
    listed = ", ".join(f"{name} {n}" for name, n in count.items())
    return f"{count.total()} tests try an attack and fail if it succeeds (`pytest -m attack`): {listed}."


def _place(text: str) -> str:
    """What is locked, and for how long, with the names of the target in words; without the reasons."""
    words = {"table": "the table", "vectors": "the table of the vectors", "relation": "the table or partition"}
    place = re.split(r";|, (?:since|while) ", text.strip())[0]
    return re.sub(r"\{(\w+)\}", lambda m: words.get(m[1], f"the {m[1].replace('_', ' ')}"), place)


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
