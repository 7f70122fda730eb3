"""What the Tab key completes: params files, phases, rollbacks, operations, run ids.

Imports next to nothing, since the shell starts the command for each press of the key.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from click import Context, Parameter
from click.shell_completion import CompletionItem

from runbook_lib.core.registry import MIGRATE, OPERATE, STEPS, UNDO, UNDO_OPERATION, operation_of, short, waits

HELP = """\b
Tab completion, in one line of ~/.bashrc (zsh_source in ~/.zshrc):
  eval "$(_RUNBOOK_COMPLETE=bash_source runbook)"
For fish, in ~/.config/fish/completions/runbook.fish:
  _RUNBOOK_COMPLETE=fish_source runbook | source
"""
# The folders of params files and of runs.
FOLDERS, RUNS = ("params", "."), Path("runs")
# Width of a command's help, which click indents by two.
WIDTH = 78


def listed(title: str, names: Iterable[str]) -> str:
    """Steps with what they do, for a command's help."""
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 23, break_on_hyphens=False)
    said = [wrap.fill(f"  {short(name):<20} {STEPS[name].does}") for name in names]
    return "\n".join(["\b", f"{title}:", *said, ""])


def params_files(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Params files of the project; if none matches, files as the shell completes them."""
    names = (path.as_posix() for folder in FOLDERS for path in sorted(Path(folder).glob("*.y*ml")))
    found = [CompletionItem(name) for name in names if name.startswith(incomplete) and "compose" not in name]
    return found or [CompletionItem(incomplete, type="file")]


def phases(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """The phases of the migration."""
    return _beginning_with(incomplete, MIGRATE)


def rollbacks(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """The rollbacks of the migration."""
    return _beginning_with(incomplete, UNDO)


def operations(ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """The operations; after ``--undo`` those that can be rolled back."""
    return _beginning_with(incomplete, map(operation_of, UNDO_OPERATION) if ctx.params.get("take_back") else OPERATE)


def approvable(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Steps that can wait for a sign-off."""
    return _beginning_with(incomplete, filter(waits, (*MIGRATE, *OPERATE)))


def run_ids(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Runs whose record is below ``runs/``, newest first."""
    found = sorted((path.parent.name for path in RUNS.glob("*/manifest.json")), reverse=True)
    return [CompletionItem(name) for name in found if name.startswith(incomplete)]


def _beginning_with(incomplete: str, names: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(short(n), help=STEPS[n].does) for n in names if short(n).startswith(incomplete)]
