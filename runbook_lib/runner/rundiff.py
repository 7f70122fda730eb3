"""What differs between two runs: their figures first, from manifest and ledger copy, then the executed notebooks."""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from runbook_lib.core import plans
from runbook_lib.core.display import Table, number, plain
from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.runner import manifest as manifests
from runbook_lib.runner.manifest import Manifest
from runbook_lib.runner.verify import LEDGER_COPY

# Rows of the ledger that hold figures, with what they are called here; in the order in which a reader asks for them.
KINDS = {
    "load": "load",
    "backfill": "backfill",
    "tuning": "recall",
    "shadow": "search",
    "baseline": "baseline",
    "index": "index",
    "canary": "canary",
    "route": "route",
    "plan": "preflight",
}
# Curves and copies of what stands elsewhere: what they come to is a figure of its own.
LEFT_OUT = {"samples", "params", "lines", "per_query", "first_right", "gains", "losses", "notices"}

IS_TIME = re.compile(r"^seconds\.|seconds$|_ms$|_at$")


@dataclass(frozen=True)
class Side:
    """One run as it lies in its folder. rows: its copy of the ledger, or what it would have carried out."""

    folder: Path
    run: Manifest
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """What differs between two runs, each part as a table; an empty one where they are the same."""

    a: Side
    b: Side
    figures: Table
    gates: Table
    statements: Table

    @property
    def differ(self) -> bool:
        """Does any gate, statement or figure differ, times apart? No two runs take equally long."""
        figures = [row for row in self.figures.rows if not IS_TIME.search(str(row[0]))]
        return bool(figures or self.gates.rows or self.statements.rows)

    def __str__(self) -> str:
        parts = [f"A  {self.a.run.run_id}  {self.a.run.status}", f"B  {self.b.run.run_id}  {self.b.run.status}"]
        for title, table in (
            ("Figures", self.figures),
            ("Gates whose verdict changed", self.gates),
            ("Statements of one run alone", self.statements),
        ):
            parts.append(f"\n{title}\n{table}" if table.rows else f"\n{title}: none")
        return "\n".join(parts)


def find(name: str, runs_dir: Path) -> Side:
    """A run by its folder, or by its id below ``runs_dir``. Raises BadInput where there is no such record."""
    folder = next((f for f in (Path(name), runs_dir / name) if (f / manifests.FILE).is_file()), None)
    if folder is None:
        raise BadInput([_no_record(name, f"no {manifests.FILE} there, nor in {runs_dir / name}", runs_dir)])
    try:
        copy = folder / LEDGER_COPY
        rows = json.loads(copy.read_text("utf-8")) if copy.is_file() else []
        return Side(folder, manifests.read(folder), [*rows, *plans.read(folder)])
    except (OSError, ValueError) as error:
        raise BadInput([_no_record(name, " ".join(str(error).split()), runs_dir)]) from error


def compare(a: Side, b: Side) -> Difference:
    """Everything that differs, except what always does: ids, times of day, hashes."""
    return Difference(a, b, _figures(a, b), _gates(a, b), _statements(a, b))


def _figures(a: Side, b: Side) -> Table:
    first, second = dict(_all_figures(a)), dict(_all_figures(b))
    names = list(first) + [n for n in second if n not in first]
    rows = [
        (name, _shown(first.get(name)), _shown(second.get(name)), _change(first.get(name), second.get(name)))
        for name in names
        if first.get(name) != second.get(name)
    ]
    return Table(("figure", "A", "B", "change"), rows)


def _all_figures(side: Side) -> Iterator[tuple[str, Any]]:
    """Named figures of a run: of a kind that was written twice, the newest."""
    yield "run.status", side.run.status
    newest: dict[str, Any] = {row["kind"]: row["body"] for row in side.rows}
    for kind, name in KINDS.items():
        if kind in newest:
            yield from _flat(name, newest[kind])
    for phase in side.run.phases:
        yield f"seconds.{phase.name}", phase.seconds
    for name, value in side.run.versions.items():
        yield f"version.{name}", value


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Figures of nested data by dotted names; the points of a curve by their setting."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in LEFT_OUT:
                yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            labelled = isinstance(inner, Mapping) and "value" in inner
            yield from _flat(f"{name}.{inner['value'] if labelled else position}", inner)
    else:
        yield name, value


def _gates(a: Side, b: Side) -> Table:
    first, second = _verdicts(a), _verdicts(b)
    rows = [
        (*key, first.get(key, "–"), second.get(key, "–"))
        for key in {**first, **second}
        if first.get(key) != second.get(key)
    ]
    return Table(("phase", "gate", "subject", "A", "B"), rows)


def _verdicts(side: Side) -> dict[tuple[str, str, str], str]:
    gates = [(row["phase"], row["body"]) for row in side.rows if row["kind"] == "gate"]
    return {(phase, g["name"], g["subject"]): g["verdict"] for phase, g in gates}


def _statements(a: Side, b: Side) -> Table:
    first, second = _sql(a), _sql(b)
    only = [("A", *s) for s in first if s not in second] + [("B", *s) for s in second if s not in first]
    return Table(("run", "phase", "lock", "statement"), only)


def _sql(side: Side) -> list[tuple[str, str, str]]:
    statements = [(row["phase"], row["body"]) for row in side.rows if row["kind"] in ("statement", "planned")]
    return [(phase, s["lock"] or "none", " ".join(s["sql"].split())) for phase, s in statements]


def _shown(value: Any) -> Any:
    return "–" if value is None else value


def _change(a: Any, b: Any) -> str:
    both = isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool)
    return f"{number(float(b / a))} ×" if both and a else ""


def notebooks(found: Difference, *, colour: bool = False) -> str:
    """What differs in the executed notebooks, as ``nbdiff -M -D`` says it, the runs' ids left out."""
    from nbdime.diffing.notebooks import diff_notebooks, set_notebook_diff_targets
    from nbdime.prettyprint import PrettyPrintConfig, pretty_print_notebook_diff

    # Neither metadata nor details: both runs have times and execution counts of their own.
    set_notebook_diff_targets(metadata=False, details=False)
    buffer = io.StringIO()
    for path in sorted(found.a.folder.glob("*.ipynb")):
        other = found.b.folder / path.name
        if other.is_file():
            a, b = _notebook(path, found.a.run), _notebook(other, found.b.run)
            difference = diff_notebooks(a, b)
            config = PrettyPrintConfig(out=buffer, use_color=colour)
            pretty_print_notebook_diff(str(path), str(other), a, difference, config)
    return buffer.getvalue()


def _notebook(path: Path, run: Manifest) -> Any:
    text = path.read_text("utf-8").replace(run.run_id, "RUN-ID")
    # Plain before the colours of the differences come in, which a terminal is to obey.
    shown = json.dumps(_plain(json.loads(text)))
    notebook = nbformat.reads(shown, as_version=4)  # type: ignore[no-untyped-call]
    for position, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{position}"  # papermill gives the cell of the parameters a new one each time
    return notebook


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return plain(value) if isinstance(value, str) else value


def _no_record(name: str, found: str, runs_dir: Path) -> Gate:
    near = difflib.get_close_matches(Path(name).name, [run.run_id for _, run in manifests.all_runs(runs_dir)], n=1)
    return Gate(
        "rundiff.record_is_there",
        Verdict.FAIL,
        name,
        found,
        "a run's folder, or its id",
        "there is nothing to compare",
        f"did you mean {near[0]}?" if near else "see index.html in the runs folder, or give --runs-dir",
    )
