"""The record of a run, and of a whole migration, for a reviewer who was not there: pages that need nothing else."""

from __future__ import annotations

import errno
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import psycopg
from markupsafe import Markup, escape
from nbconvert import HTMLExporter
from papermill.execute import ERROR_MARKER_TAG
from pygments.formatters import HtmlFormatter

from runbook_lib.core import db, plans
from runbook_lib.core.display import duration, number, scroller, size
from runbook_lib.core.gates import SYMBOLS as GATE_SYMBOLS
from runbook_lib.core.gates import BadInput
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.registry import short
from runbook_lib.params import Params
from runbook_lib.runner import folders, history, manifest, rollbacks
from runbook_lib.runner.figures import Entry
from runbook_lib.runner.history import History
from runbook_lib.runner.manifest import SYMBOLS, Manifest, Status
from runbook_lib.runner.review import RecordPage, Texts, collect
from runbook_lib.sql import load

SQL = load("runner")
# A wide table of a notebook scrolls by itself, by the arrow keys too, and its edge says that there is more.
TABLE = re.compile(r'(?<!overflow-x:auto">)<table\b.*?</table>', re.S)
CODE_LIGHT, CODE_DARK = "default", "github-dark"

CODE = re.compile("`([^`]+)`")

HEADLINES = {
    Status.RUNNING: "still running when this page was made",
    Status.PLANNED: "plan only: nothing was changed",
    Status.PASSED: "every gate passed",
    Status.FAILED: "a gate did not pass",
    Status.WAITING: "waits for approval",
    Status.INTERRUPTED: "interrupted",
    Status.CRASHED: "crashed",
}


def write(folder: Path, params: Params, run: Manifest) -> None:
    """Writes the run's ``ledger.json``, a page a notebook and ``index.html``; and the pages that all runs share.

    A server that is gone costs the page its ledger, never the page.
    """
    notes: list[str] = []
    entries: list[Entry] = []
    texts = Texts()
    try:
        with db.connect(params, "runbook-runner record") as connection:
            entries = list(Ledger(connection, params, run.run_id, "").entries())
            texts = _texts(connection, params, entries)
        content = json.dumps([e for e in entries if e["run_id"] == run.run_id], indent=1, default=str)
        manifest.write_atomically(folder / "ledger.json", content + "\n")
    except (BadInput, psycopg.Error) as error:
        notes.append(f"The ledger could not be read when this page was made: {' '.join(str(error).split())}")
    for phase in run.phases:
        page = notebook_page(folder / f"{phase.file}.ipynb", run)
        if page:
            manifest.write_atomically(folder / f"{phase.file}.html", page)
    done = [p.name for p in run.phases if (folder / f"{p.file}.html").is_file()]
    manifest.write_atomically(
        folder / "index.html", render(collect(run, [*entries, *plans.read(folder)], done, notes, texts))
    )
    if not notes:
        _write_target(params, run.params_file, entries)
    write_list(folder.parent)


def write_derived(params: Params, params_file: str) -> Path:
    """Writes the page of the target's whole migration, from the ledger alone, and the list of all runs.

    Returns the target's page. Raises BadInput where the server cannot be reached, or the page not be written.
    """
    try:
        with db.connect(params, "runbook record") as connection:
            return _write_target(params, params_file, Ledger(connection, params, "", "").entries())
    except OSError as error:
        raise BadInput([folders.no_record(params.record.runs_dir, error)]) from error
    finally:
        # Last: it links to the page of each target that has one.
        if params.record.runs_dir.is_dir():
            write_list(params.record.runs_dir)


def _write_target(params: Params, params_file: str, entries: Iterable[Entry]) -> Path:
    """Raises OSError where it cannot be written, and where a link leads somewhere else."""
    runs_dir, name = params.record.runs_dir, params.target.name
    folder = runs_dir / name
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "its page would be written to where a link leads", str(folder))
    folder.mkdir(params.record.folder_mode, parents=True, exist_ok=True)
    pages = {f.name for f, _ in manifest.all_runs(runs_dir) if (f / "index.html").is_file()}
    table = f"{params.target.schema_}.{params.target.table}"
    page = target_page(history.collect(name, table, params_file, entries, pages))
    manifest.write_atomically(folder / "index.html", page)
    return folder / "index.html"


def target_page(told: History) -> str:
    """The page of a target's whole migration, self-contained."""
    return _templates().get_template("target.html.j2").render(h=told)


def _texts(connection: db.Connection, params: Params, entries: Iterable[Entry]) -> Texts:
    """Queries and beginnings of rows that the newest comparison names; none where they are not there any more."""
    moved = next((e["body"].get("moved") or {} for e in reversed(list(entries)) if e["kind"] == "shadow"), {})
    shown = [m for key in ("gains", "losses") for m in moved.get(key, ())]
    # As one literal, so that the key keeps its type, and its index is used.
    keys = ",".join(
        json.dumps(found[1], ensure_ascii=False) for m in shown for found in (m["before"], m["after"]) if found
    )
    try:
        rows = db.rows(connection, SQL["first_words"], params, keys=f"{{{keys}}}") if keys else []
    except psycopg.Error:
        rows = []
    return Texts(_queries(params) if shown else {}, {row["key"]: " ".join(row["text"].split()) for row in rows})


def _queries(params: Params) -> dict[str, str]:
    """Texts by query id; empty where the file is not there any more, or says something else by now."""
    try:
        lines = [json.loads(line) for line in params.queries.file.read_text("utf-8").split("\n") if line.strip()]
        return {str(line["query_id"]): str(line["text"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def prune(params: Params, run: Manifest) -> None:
    """Removes old records as ``record.keep`` asks for it, and takes them off the pages that list them."""
    if folders.prune(params, run):
        with suppress(BadInput, psycopg.Error):  # the run has ended; these pages may wait for the next
            write_derived(params, run.params_file)


def write_list(runs_dir: Path) -> None:
    """Writes ``index.html`` of all runs, newest first, a section a target."""
    manifest.write_atomically(runs_dir / "index.html", list_page(runs_dir))


def list_page(runs_dir: Path) -> str:
    """The page of all runs that have ended, as their manifests tell them; one under way gets its page at its end."""

    def of(item: tuple[Path, Manifest]) -> tuple[str, str]:
        return item[1].table, item[1].target

    ended = (item for item in manifest.all_runs(runs_dir) if item[1].status != Status.RUNNING)
    targets = [(*names, list(runs)) for names, runs in groupby(sorted(ended, key=of), key=of)]
    targets = [
        (table, name if (runs_dir / name / "index.html").is_file() else "", runs) for table, name, runs in targets
    ]
    return _templates().get_template("runs.html.j2").render(targets=targets)


def render(record: RecordPage) -> str:
    """The page, self-contained: no script, no address of another server."""
    return _templates().get_template("record.html.j2").render(r=record, run=record.manifest)


def notebook_page(path: Path, run: Manifest) -> str:
    """An executed notebook as a page of its own; empty where there is none, or only half of one."""
    try:
        notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    except (OSError, ValueError):
        return ""
    # papermill's red banner at the top says less than ours; its mark at the failing cell stays, as the link's end.
    marked = [i for i, c in enumerate(notebook.cells) if ERROR_MARKER_TAG in c.metadata.get("tags", [])]
    notebook.cells = [c for i, c in enumerate(notebook.cells) if i not in marked[:-1]]
    options = {"template_name": "basic", "exclude_input_prompt": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(**options)  # type: ignore[no-untyped-call]
    body, _resources = exporter.from_notebook_node(notebook)
    body = TABLE.sub(lambda table: scroller(table[0], "Table"), body)
    phase = next((p for p in run.phases if p.file == path.stem), None)
    page = _templates().get_template("notebook.html.j2")
    return page.render(run=run, phase=phase, body=Markup(body), stopped_at=bool(marked))  # noqa: S704


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("runbook_lib.runner"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "number": number,
        "size": size,
        "when": _when,
        "figures": _figures,
        "json": _json,
        "code": _code,
        "shell": shlex.quote,
        "short": short,
    }
    environment.globals |= {
        "symbols": dict(SYMBOLS),
        "gate_symbols": dict(GATE_SYMBOLS),
        "headlines": dict(HEADLINES),
        "undo": rollbacks.command,
        "code_light": Markup(HtmlFormatter(style=CODE_LIGHT).get_style_defs(".highlight")),  # noqa: S704
        "code_dark": Markup(HtmlFormatter(style=CODE_DARK).get_style_defs(".highlight")),  # noqa: S704
    }
    return environment


def _when(iso: str) -> str:
    return iso.replace("T", " ").removesuffix("+00:00")[:19] + " UTC" if iso else ""


def _figures(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} = {number(v) if isinstance(v, int | float) else v}" for k, v in figures.items())


def _code(text: str) -> Markup:
    """A sentence as HTML; what stands in backquotes is a command."""
    return Markup(CODE.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
