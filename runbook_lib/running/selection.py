"""Which phases a run is made of: checked before anything is started."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import runbook_lib
from runbook_lib import db
from runbook_lib.checking.inputs import input_problems
from runbook_lib.gates import BadInput, Gate, Verdict
from runbook_lib.ledger import Ledger
from runbook_lib.params import Params
from runbook_lib.phases import MIGRATE, OPERATE, UNDO
from runbook_lib.running.manifest import SYMBOLS, Status

ORDERS = {"migrate": MIGRATE, "undo": tuple(UNDO), "operate": tuple(OPERATE)}
NOTEBOOKS_ENV = "RUNBOOK_NOTEBOOKS"


def notebooks() -> Path:
    """The folder of the notebooks: beside the package, or where RUNBOOK_NOTEBOOKS points."""
    elsewhere = os.environ.get(NOTEBOOKS_ENV)
    return Path(elsewhere) if elsewhere else Path(runbook_lib.__file__).parent.parent / "notebooks"


def check(params: Params, way: str, first: str | None, last: str | None) -> None:
    """Raises BadInput for phases, notebooks, parameters or a server that a run cannot be made of."""
    order = ORDERS[way]
    problems = [_unknown_phase(p, order) for p in (first, last) if p is not None and p not in order]
    if not problems and first and last and order.index(first) > order.index(last):
        problems = [
            _bad_choice("runner.range_is_in_order", f"{first} to {last}", f"{last} comes before {first}", "swap them")
        ]
    needed = order if way != "operate" else tuple(n for n in order if n in (first, last))
    missing = [n for n in needed if not (notebooks() / way / f"{n}.ipynb").is_file()] if not problems else []
    if missing:
        do = f"install with `pip install --editable .`, or set {NOTEBOOKS_ENV} to the folder that holds {way}/"
        problems = [_bad_choice("runner.notebooks_are_there", str(notebooks() / way), f"no {missing[0]}.ipynb", do)]
    if problems:
        raise BadInput(problems)
    if way == "migrate":
        # The way back must not depend on what only the way forward needs, a model for instance.
        found = input_problems(params)
        if found.failed:
            raise BadInput(found.failed)
    else:
        db.connect(params, "runbook-runner").close()


def chosen(
    params: Params, way: str, first: str | None, last: str | None, execute: bool, say: Callable[[str], None]
) -> tuple[str, ...]:
    """The phases to run: from the first that is not proved yet, where a migration is carried out and names none."""
    order = ORDERS[way]
    if first is None and execute and way == "migrate":
        with db.connect(params, "runbook-runner") as connection:
            ledger = Ledger(connection, params, "", "")
            proved = [p for p in order if ledger.phase_verdict(p) == Verdict.PASS]
        first = next((p for p in order if p not in proved), None)
        if first is None or (last is not None and order.index(first) > order.index(last)):
            say(f"{SYMBOLS[Status.PASSED]} nothing left to do: {last or 'every phase'} has passed in this database")
            return ()
        if first != order[0]:
            say(f"proved in this database up to {order[order.index(first) - 1]}; going on with {first}")
    start = order.index(first) if first else 0
    end = order.index(last) + 1 if last else len(order)
    return order[start:end]


def _unknown_phase(name: str, order: tuple[str, ...]) -> Gate:
    near = difflib.get_close_matches(name, order, n=1, cutoff=0.4) or [p for p in order if p.startswith(name[:2])]
    do = f"did you mean {near[0]}?" if near else f"phases: {', '.join(order)}"
    return _bad_choice("runner.phase_is_known", name, "no such phase", do)


def _bad_choice(name: str, subject: str, found: str, do: str) -> Gate:
    return Gate(
        name,
        Verdict.FAIL,
        subject,
        found,
        "phases of this runbook, in their order",
        "another phase than the one meant would run; nothing was started",
        do,
    )
