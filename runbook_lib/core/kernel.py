"""The kernel of a notebook: one phase at a time, no secret in its output, a word when it is interrupted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from IPython.core.getipython import get_ipython

from runbook_lib.core.redaction import redacted

INTERRUPTED = (
    "Interrupted. The statement under way was cancelled in the server; what was committed before it stays.\n"
    "Run this cell again to resume."
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


def keep_secrets() -> None:
    """From here on every message of the kernel, be it printed, shown or a traceback, leaves without a secret.

    All of them are packed by the one session; outside a kernel there is none. What child processes print is such a
    message too, and ipykernel would repeat it, as it is, to the terminal that the kernel was started from.
    """
    session = getattr(getattr(get_ipython(), "kernel", None), "session", None)
    if session is None or isinstance(session.pack, _Packer):
        return
    session.pack = _Packer(session.pack)
    with Path(os.devnull).open("wb") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            if (terminal := getattr(stream, "_original_stdstream_copy", None)) is not None:
                os.dup2(nowhere.fileno(), terminal)


@dataclass(frozen=True)
class _Packer:
    """Packs a part of a message as ``pack`` does, redacted."""

    pack: Callable[[Any], bytes]

    def __call__(self, content: Any) -> bytes:
        return self.pack(redacted(content))


def _say_interrupted(
    shell: Any, kind: type[BaseException], error: BaseException, _traceback: Any, tb_offset: int | None = None
) -> None:
    """In place of a traceback through this library and the driver. Name and value of the exception stay."""
    shell._showtraceback(kind, error, [INTERRUPTED])
