"""The documents: made ones are current, recipes can be parsed, and what they name exists."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from runbook_lib.cli import documents
from runbook_lib.core.registry import MIGRATE, OPERATE, UNDO

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SETTINGS_OF = ("citus.", "hnsw.", "ivfflat.")
GATE = re.compile(r"`([a-z]+\.[a-z_]+)`")


def recipes(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / "unattended.md").read_text("utf-8"), re.S)


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_a_document_made_from_the_code_is_current(name: str) -> None:
    made = documents.DOCUMENTS[name]()
    assert (DOCS / name).read_text("utf-8") == made, "run: python -m runbook_lib.cli.documents"


def test_crontab_lines_have_five_fields_and_a_command_that_a_shell_can_parse() -> None:
    (crontab,) = recipes("cron")
    lines = [x for x in crontab.splitlines() if x and not x.startswith("#") and not re.match(r"\w+=", x)]
    assert lines
    for line in lines:
        *fields, command = line.split(maxsplit=5)
        assert len(fields) == 5 and all(re.fullmatch(r"[\d*,/-]+", f) for f in fields)
        subprocess.run(["sh", "-n", "-c", command], check=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_units_are_valid(tmp_path: Path) -> None:
    service, timer = recipes("ini")
    # The program and the user that the unit names are not on this machine.
    service = re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", service, flags=re.M)
    service = re.sub(r"^(User|WorkingDirectory)=.*\n", "", service, flags=re.M)
    for name, text in (("runbook-articles.service", service), ("runbook-articles.timer", timer)):
        (tmp_path / name).write_text(text)
    units = sorted(map(str, tmp_path.iterdir()))
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    ours = [line for line in checked.stderr.splitlines() if "runbook-articles" in line]
    assert ours == []


def test_the_dag_is_valid_python_and_the_pipelines_are_valid_yaml() -> None:
    (dag,) = recipes("python")
    ast.parse(dag)
    actions, gitlab = (yaml.safe_load(text) for text in recipes("yaml"))
    assert any("runbook check" in step.get("run", "") for step in actions["jobs"]["check"]["steps"])
    assert any("runbook check" in line for line in gitlab["runbook check"]["script"])


def gates_of_the_library() -> set[str]:
    sources = "\n".join(p.read_text("utf-8") for p in (ROOT / "runbook_lib").rglob("*.py"))
    named = set(re.findall(r'"([a-z]+\.[a-z_]+)"', sources))
    # Some modules build the name from its second half.
    halves = re.findall(r'f"([a-z]+)\.\{', sources)
    facts = set(re.findall(r'"([a-z]+(?:_[a-z]+)+)"', sources))
    return named | {f"{module}.{fact}" for module in halves for fact in facts}


@pytest.mark.parametrize("name", ["troubleshooting.md", "dba.md", "reviewers.md"])
def test_every_gate_that_a_document_names_exists(name: str) -> None:
    known = gates_of_the_library()
    suffixes = (".md", ".yaml", ".json", ".html", ".py", ".ipynb", ".jsonl", ".sql")
    text = (DOCS / name).read_text("utf-8")
    headings = re.findall(r"^### `([a-z]+\.[a-z_]+)`", text, re.M)
    named = (g for g in GATE.findall(text) if not g.endswith(suffixes) and not g.startswith(SETTINGS_OF))
    gates = [g for g in named if g.split(".")[1].count("_")]
    parameters = {f"{line}" for line in re.findall(r"`([a-z_]+\.[a-z_]+)`", (DOCS / "parameters.md").read_text())}
    unknown = [g for g in [*headings, *gates] if g not in known | parameters | set(own_parameters())]
    assert unknown == []


def own_parameters() -> Iterator[str]:
    from runbook_lib.params import reference

    for key, *_ in reference.rows():
        yield key


def test_the_dbas_page_has_every_phase_and_every_way_back() -> None:
    text = (DOCS / "dba.md").read_text("utf-8")
    assert [name for name in (*MIGRATE, *UNDO) if f"`{name}`" not in text and f"`undo/{name}`" not in text] == []


@pytest.mark.parametrize("name", list(OPERATE))
def test_the_table_of_operations_names_each(name: str) -> None:
    assert f"| `{name}` |" in (DOCS / "operations.md").read_text("utf-8")
