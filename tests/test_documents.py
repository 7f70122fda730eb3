"""The documents: parts made from the code are current, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runbook_lib.cli import documents
from runbook_lib.cli.main import main
from runbook_lib.core.registry import MIGRATE, OPERATE, STEPS, UNDO, notebook, short
from runbook_lib.params import reference
from runbook_lib.runner.manifest import BAD_INPUT, EXIT_CODES, MEANINGS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SETTINGS_OF = ("citus.", "hnsw.", "ivfflat.")
GATE = re.compile(r"`([a-z]+\.[a-z_]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
COMMAND = re.compile(r"(?:`|^|bin/)runbook ([a-z][a-z-]+)([^`\n#]*)", re.M)
MOST_WORDS, MOST_WORDS_IN_README, MOST_PAGES = 11_000, 900, 8

every_page = pytest.mark.parametrize("page", documents.pages(), ids=lambda p: p.name)


@every_page
def test_what_a_page_takes_from_the_code_is_current(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text == documents.filled(text), "run: python -m runbook_lib.cli.documents"


def test_every_part_made_from_the_code_is_on_exactly_one_page() -> None:
    marks = [name for page in documents.pages() for name, _ in documents.MADE.findall(page.read_text("utf-8"))]
    assert sorted(marks) == sorted(documents.PARTS)


@pytest.mark.parametrize("name", STEPS)
def test_a_notebooks_table_of_changes_says_what_its_statements_say(name: str) -> None:
    text = (ROOT / "notebooks" / notebook(name)).read_text("utf-8")
    assert text == documents.notebook_filled(name, text), "run: python -m runbook_lib.cli.documents"


def test_every_statement_that_locks_something_of_the_users_is_in_a_table_of_changes() -> None:
    tables = "".join((ROOT / "notebooks" / notebook(name)).read_text("utf-8") for name in STEPS)
    named = set(re.findall(r"`([a-z_]+\.[a-z_]+)`", tables))
    # Those of trials are rolled back at once; the table of preflight has them in one row.
    locking = {block.name for block in documents.locking() if not block.name.startswith("trials.")}
    # What Citus takes in the place of a statement goes by that one's name.
    assert {re.sub(r"^citus\.(?=\w+\.)", "", name) for name in locking} - named == set()


def words(page: Path) -> int:
    """Words of a page, without the borders and figures of tables and the marks of lists."""
    return sum(1 for word in page.read_text("utf-8").split() if re.search(r"[^\W\d_]", word))


def test_the_documents_stay_short() -> None:
    pages = sorted(DOCS.glob("*.md"))
    assert len(pages) <= MOST_PAGES
    assert sum(map(words, pages)) <= MOST_WORDS
    assert words(ROOT / "README.md") <= MOST_WORDS_IN_README


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*documents.pages(), ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text("utf-8")):
        target = page if not path else (page.parent / path)
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", [*documents.pages(), ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_every_command_and_option_that_a_page_names_exists(page: Path) -> None:
    for name, rest in COMMAND.findall(page.read_text("utf-8")):
        assert name in main.commands, name
        known = {option for param in main.commands[name].params for option in param.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"{name}{rest}"


def test_every_exit_code_has_a_meaning() -> None:
    assert set(MEANINGS) == {*EXIT_CODES.values(), BAD_INPUT}


def gates_of_the_library() -> set[str]:
    sources = "\n".join(p.read_text("utf-8") for p in (ROOT / "runbook_lib").rglob("*.py"))
    named = set(re.findall(r'"([a-z]+\.[a-z_]+)"', sources))
    # Some modules build the name from its second half.
    halves = re.findall(r'f"([a-z]+)\.\{', sources)
    facts = set(re.findall(r'"([a-z]+(?:_[a-z]+)+)"', sources))
    return named | {f"{module}.{fact}" for module in halves for fact in facts}


@pytest.mark.parametrize("name", ["guide.md", "operations.md", "security.md", "reviewers.md", "unattended.md"])
def test_every_gate_and_parameter_that_a_document_names_exists(name: str) -> None:
    suffixes = (".md", ".yaml", ".json", ".html", ".py", ".ipynb", ".jsonl", ".sql")
    named = GATE.findall((DOCS / name).read_text("utf-8"))
    checked = [g for g in named if not g.endswith(suffixes) and not g.startswith(SETTINGS_OF) and "_" in g]
    known = gates_of_the_library() | {key for key, *_ in reference.rows()}
    assert [g for g in checked if g not in known and not g.startswith("runbook.")] == []


def test_the_guide_has_every_phase_and_every_rollback() -> None:
    text = (DOCS / "guide.md").read_text("utf-8")
    assert [name for name in (*MIGRATE, *UNDO) if f"`{name}`" not in text] == []


def test_the_readme_names_the_rollback_of_every_phase_that_changes_something() -> None:
    lines = re.findall(r"^\| (\d\d_\w+) \| (.*?) \|.*\| ([^|]+) \|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert [phase for phase, *_ in lines] == list(MIGRATE)
    rolled_back_by = {phase: name for name in UNDO for phase in STEPS[name].rolls_back}
    needed = [(p, "–" if changes.startswith("nothing") else rolled_back_by[p]) for p, changes, _ in lines]
    assert [(phase, rollback) for phase, _, rollback in lines] == needed


@pytest.mark.parametrize("name", list(OPERATE))
def test_the_table_of_operations_names_each(name: str) -> None:
    assert f"| `{short(name)}` |" in (DOCS / "operations.md").read_text("utf-8")


def test_contributing_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    paths = re.findall(r"`((?:runbook_lib|notebooks|tests|docs)/[\w./]+)`", text)
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
