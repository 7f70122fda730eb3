"""The kernel that a notebook runs in: it holds one phase at a time, and an interrupt ends a cell with a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from IPython.core.getipython import get_ipython

INTERRUPTED = (
    "Interrupted. The statement under way was cancelled in the server; what was committed before it stays.\n"
    "Run this cell again to go on from there."
)

# How the phase that is open now is ended: called with why, and with what comes next.
_held: list[Callable[[str, str], str]] = []


def let_go(why: str, following: str) -> str:
    """Ends what this kernel opened before: the first cell can be run again, and the claim on the target is not
    refused to the notebook that has it. Returns the name of what was still open."""
    names = []
    while _held:
        names.append(_held.pop()(why, following))
    return ", ".join(filter(None, names))


def hold(end: Callable[[str, str], str]) -> None:
    """Remembers how to end the phase that is open now."""
    _held.append(end)
    if shell := get_ipython():
        shell.set_custom_exc((KeyboardInterrupt,), _say_interrupted)  # type: ignore[no-untyped-call]


def _say_interrupted(
    shell: Any, kind: type[BaseException], error: BaseException, _traceback: Any, tb_offset: int | None = None
) -> None:
    """In place of a traceback through this library and the driver. Name and value of the exception stay."""
    shell._showtraceback(kind, error, [INTERRUPTED])
