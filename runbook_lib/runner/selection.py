"""Which phases a run is made of: checked before anything is started."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nbformat

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.registry import (
    INPUTS,
    MIGRATE,
    NOTEBOOKS_ENV,
    OLD_NAMES,
    OPERATE,
    STEPS,
    UNDO,
    UNDO_OPERATION,
    current,
    function,
    notebook,
    notebooks,
    operation_of,
    rollback_of,
    short,
)
from runbook_lib.params import Params
from runbook_lib.runner.manifest import SYMBOLS, Status

ORDERS = {"migrate": MIGRATE, "undo": UNDO, "operate": OPERATE}


def rollback_of_operation(operation: str) -> str:
    """The name of the rollback of an operation. Raises BadInput where there is none, saying why."""
    operation = current(operation, "operate")
    if operation not in OPERATE:
        raise BadInput([_unknown_step(operation, OPERATE)])
    if rollback := rollback_of(operation):
        return rollback
    raise BadInput(
        [
            Gate(
                "runner.operation_has_a_way_back",
                Verdict.FAIL,
                operation,
                STEPS[operation].no_rollback,
                f"one of {', '.join(map(operation_of, UNDO_OPERATION))}",
                "a record would say that something was rolled back; nothing was started",
                STEPS[operation].instead,
            )
        ]
    )


def check(params: Params, way: str, first: str | None, last: str | None) -> None:
    """Raises BadInput for phases, notebooks, parameters or a server that a run cannot be made of."""
    order = _order(way, first)
    problems = [_unknown_step(p, order) for p in dict.fromkeys((first, last)) if p is not None and p not in order]
    if not problems and first and last and order.index(first) > order.index(last):
        problems = [
            _bad_choice("runner.range_is_in_order", f"{first} to {last}", f"{last} comes before {first}", "swap them")
        ]
    missing = [n for n in order if not (notebooks() / notebook(n)).is_file()] if not problems else []
    if missing:
        do = f"install with `pip install --editable .`, or set {NOTEBOOKS_ENV} to the folder that holds {way}/"
        said = f"no {Path(notebook(missing[0])).name}"
        problems = [_bad_choice("runner.notebooks_are_there", str(notebooks() / way), said, do)]
    if problems:
        raise BadInput(problems)
    check_stored(order)
    if way == "migrate":
        # A rollback must not depend on what only the migration needs, a model for instance.
        found = function(INPUTS)(params)
        if found.failed:
            raise BadInput(found.failed)
    else:
        db.connect(params, "runbook-runner").close()


def _order(way: str, first: str | None) -> tuple[str, ...]:
    """The steps that a run may take, in their order; an operation, and the rollback of one, is alone."""
    alone = {"operate": OPERATE, "undo": UNDO_OPERATION}.get(way, ())
    return (first,) if first and first in alone else ORDERS[way]


def check_stored(names: Iterable[str]) -> None:
    """Raises BadInput for notebooks that are stored ready to execute, as JupyterLab saves a change."""
    paths = [notebooks() / notebook(name) for name in names]
    if changed := [path for path in paths if path.is_file() and not _only_plans(path)]:
        do = "put `execute = False` back (git checkout), and step through copies: `runbook lab PARAMS`"
        raise BadInput([_stored(path, do) for path in changed])


def _stored(path: Path, do: str) -> Gate:
    return Gate(
        "runner.notebook_only_plans_by_default",
        Verdict.FAIL,
        f"{path.parent.name}/{path.name}",
        "its cell of parameters does not say execute = False",
        "execute = False, as it was delivered",
        "run by papermill or opened by a colleague, it would change the table without being told to",
        do,
    )


def _only_plans(path: Path) -> bool:
    try:
        cell = parameters_cell(nbformat.read(path, as_version=4))  # type: ignore[no-untyped-call]
        values = {a.targets[0].id: a.value for a in ast.parse(cell.source).body if isinstance(a, ast.Assign)}  # type: ignore[attr-defined]
        return ast.literal_eval(values["execute"]) is False
    except (ValueError, KeyError, SyntaxError, AttributeError, StopIteration):
        return False


def parameters_cell(notebook: Any) -> Any:
    """The cell that papermill puts its parameters after. Raises StopIteration where a notebook has none."""
    return next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))


def chosen(
    params: Params, way: str, first: str | None, last: str | None, execute: bool, say: Callable[[str], None]
) -> tuple[str, ...]:
    """The phases to run: from the first that is not proved yet, where a migration is carried out and names none."""
    order = _order(way, first)
    if first is None and execute and way == "migrate":
        with db.connect(params, "runbook-runner") as connection:
            ledger = Ledger(connection, params, "", "")
            proved = [p for p in order if ledger.phase_verdict(p) == Verdict.PASS]
        first = next((p for p in order if p not in proved), None)
        if first is None or (last is not None and order.index(first) > order.index(last)):
            say(f"{SYMBOLS[Status.PASSED]} nothing left to do: {last or 'every phase'} has passed in this database")
            return ()
        if first != order[0]:
            say(f"passed in this database up to {order[order.index(first) - 1]}; resuming with {first}")
    operation = operation_of(first) if first in UNDO_OPERATION else ""
    if way == "undo" and (operation or execute) and (nothing := _nothing_to_take_back(params, operation)):
        say(f"{SYMBOLS[Status.PASSED]} nothing to roll back: {nothing}")
        return ()
    start = order.index(first) if first else 0
    end = order.index(last) + 1 if last else len(order)
    return order[start:end]


def _nothing_to_take_back(params: Params, operation: str) -> str:
    """Why there is nothing, by the ledger; empty where the operation has written anything since it was rolled back.

    One that was killed has left no verdict, but its gates. operation: empty for the migration.
    """
    with db.connect(params, "runbook-runner") as connection:
        ledger = Ledger(connection, params, "", "")
        if not ledger.exists():
            return f"nothing was carried out in this database, which has no ledger in schema {params.ledger.schema_}"
        last = ledger.last_row(operation) if operation else None
    if not operation:
        return ""
    if last is None:
        return f"{operation} was never carried out on this target, by its ledger"
    if last["body"].get("verdict") != "UNDONE":
        return ""
    return f"{operation} was rolled back at {last['written_at']:%Y-%m-%d %H:%M:%S %Z} (run {last['run_id']})"


def require_known(name: str, names: tuple[str, ...]) -> None:
    """Raises BadInput, naming the nearest, where this is none of these steps."""
    if name not in names:
        raise BadInput([_unknown_step(name, names)])


def _unknown_step(name: str, order: tuple[str, ...]) -> Gate:
    """order: the steps that could be meant, of one kind or, for a sign-off, of several."""
    names = {old: new for old, new in OLD_NAMES.items() if new in order}
    names |= {short(p): p for p in order} | {p: p for p in order}
    near = [names[n] for n in difflib.get_close_matches(name, names, n=1, cutoff=0.4)]
    near += [p for p in order if p.startswith(name[:2])]
    kind = STEPS[order[0]].kind
    do = f"did you mean {short(near[0])}?" if near else f"one of {', '.join(map(short, order))}"
    return _bad_choice(f"runner.{kind}_is_known", name, f"no such {kind}", do)


def _bad_choice(name: str, subject: str, found: str, do: str) -> Gate:
    return Gate(
        name,
        Verdict.FAIL,
        subject,
        found,
        "steps of this runbook, in order",
        "the wrong step could run; nothing was started",
        do,
    )
