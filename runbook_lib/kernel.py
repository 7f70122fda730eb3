"""The kernel that a notebook runs in: it holds one phase at a time, and an interrupt ends a cell with a word."""

from __future__ import annotations

from typing import Any

from IPython.core.getipython import get_ipython

from runbook_lib import db

INTERRUPTED = (
    "Interrupted. The statement under way was cancelled in the server; what was committed before it stays.\n"
    "Run this cell again to go on from there."
)

_held: list[db.Connection] = []


def let_go() -> None:
    """Closes what a phase that this kernel opened before still holds: the first cell can be run again, and the claim
    on the target is not refused to the notebook that has it."""
    while _held:
        _held.pop().close()


def hold(*connections: db.Connection) -> None:
    """Remembers the connections of the phase that is open now. Does nothing outside IPython."""
    shell = get_ipython()
    if shell is None:
        return
    _held.extend(connections)
    shell.set_custom_exc((KeyboardInterrupt,), _say_interrupted)  # type: ignore[no-untyped-call]


def _say_interrupted(
    shell: Any, kind: type[BaseException], error: BaseException, _traceback: Any, tb_offset: int | None = None
) -> None:
    """In place of a traceback through this library and the driver. Name and value of the exception stay."""
    shell._showtraceback(kind, error, [INTERRUPTED])
