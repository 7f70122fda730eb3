"""Where a target stands, for `runbook status` and for the notebook that everything begins with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from IPython.display import Markdown

from runbook_lib.core import db
from runbook_lib.core.gates import SYMBOLS, Verdict
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.registry import MIGRATE, OPERATE, UNDO, UNDO_OPERATION, notebook, notebooks
from runbook_lib.core.target import load_params
from runbook_lib.params import Params
from runbook_lib.runner import manifest

DOCUMENTS = {"guide": "Guide and messages", "operations": "Operations", "reference": "Parameters and locks"}
MOST_RECORDS = 10


def where_it_stands(params: Params) -> dict[str, Any]:
    """Target, verdict of each phase, what comes next, and the route: what the ledger says, as plain data.

    Raises BadInput where the server cannot be reached.
    """
    with db.connect(params, "runbook status") as connection:
        ledger = Ledger(connection, params, "", "")
        there = ledger.exists()
        entries = ledger.entries()
    newest: dict[str, Any] = {e["phase"]: e for e in entries if e["kind"] == "phase"}
    routes = [e["body"] for e in entries if e["kind"] == "route"]
    runs = [e for e in entries if e["kind"] == "run"]
    phases = [
        {
            "name": name,
            "verdict": newest[name]["body"]["verdict"] if name in newest else "NOT RUN",
            "run_id": newest[name]["run_id"] if name in newest else None,
            "at": f"{newest[name]['written_at']:%Y-%m-%d %H:%M:%S %Z}" if name in newest else None,
        }
        for name in MIGRATE
    ]
    following = next((p["name"] for p in phases if p["verdict"] != Verdict.PASS), None)
    route = routes[-1]["route"] if routes else "legacy"
    share = routes[-1].get("share_percent", 100) if routes else 100
    return {
        "target": params.target.name,
        "table": f"{params.target.schema_}.{params.target.table}",
        "ledger": there,
        "phases": phases,
        "next": following,
        "route": route,
        "share_percent": share,
        "last_run": {"run_id": runs[-1]["run_id"], **runs[-1]["body"]} if runs else None,
        "summary": (f"next is {following}" if following else "every phase has passed")
        + f"; reads go to {route}"
        + (f" ({share} % of the calls)" if 0 < share < 100 else ""),
    }


def overview(params_file: str | Path) -> Markdown:
    """Where the target of this file stands, with links to each notebook beside this one, documents and records.

    Raises BadInput for parameters or a server that cannot be worked with.
    """
    params = load_params(params_file)
    stands = where_it_stands(params)
    phases = [_phase(p, p["name"] == stands["next"]) for p in stands["phases"]]
    lines = [
        f"**{_plain(stands['table'])}**, by {_plain(Path(params_file).name)}: {stands['summary']}.",
        "",
        "| phase | verdict | at | run |",
        "|---|---|---|---|",
        *phases,
        "",
        f"**Rolling back**, in this order: {_links(UNDO)}",
        "",
        f"**After the migration**: {_links(OPERATE)}",
        "",
        f"**Rolling an operation back**: {_links(UNDO_OPERATION)}",
        *_documents(),
        *_records(params),
    ]
    return Markdown("\n".join(lines))  # type: ignore[no-untyped-call]


def _phase(phase: dict[str, Any], is_next: bool) -> str:
    link = f"[{phase['name']}](migrate/{phase['name']}.ipynb)"
    name = f"**{link}** ← next" if is_next else link
    symbol = SYMBOLS.get(phase["verdict"], "")
    return f"| {name} | {symbol} {phase['verdict']} | {phase['at'] or ''} | {_plain(phase['run_id'] or '')} |"


def _links(names: Iterable[str]) -> str:
    return " · ".join(f"[{name}]({notebook(name)})" for name in names)


def _documents() -> list[str]:
    """Links to the documents, where the project is checked out around its notebooks."""
    folder = notebooks().resolve().parent / "docs"
    there = {folder / f"{name}.md": title for name, title in DOCUMENTS.items() if (folder / f"{name}.md").is_file()}
    said = " · ".join(f"[{title}]({os.path.relpath(path)})" for path, title in there.items())
    return ["", f"**Documents**: {said}"] if said else []


def _records(params: Params) -> list[str]:
    """Links to the records of this target, newest first."""
    runs_dir = params.record.runs_dir
    pages = [
        (folder / "index.html", run)
        for folder, run in manifest.all_runs(runs_dir)
        if run.target == params.target.name and (folder / "index.html").is_file()
    ]
    said = [f"- [{_plain(run.run_id)}]({os.path.relpath(page)}): {run.status}" for page, run in pages]
    return ["", "**Records**", "", *said[:MOST_RECORDS]] if said else []


def _plain(text: str) -> str:
    """Text in which no character means anything to Markdown or HTML."""
    return "".join(c if c.isalnum() or c in " .-:_" else f"&#{ord(c)};" for c in text).replace("_", "&#95;")
