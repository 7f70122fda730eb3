"""What every command shares: results on stdout, progress and errors on stderr, and exit codes that mean something."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import psycopg

from runbook_lib.gates import BadInput, GateFailed, RunbookError
from runbook_lib.running.manifest import BAD_INPUT, EXIT_CODES, Status

GATE_DID_NOT_PASS = EXIT_CODES[Status.FAILED]
CRASHED = EXIT_CODES[Status.CRASHED]
COLOURS = {"✔": "green", "✘": "red", "■": "yellow", "⏸": "yellow"}

PARAMS = click.argument("params_file", metavar="PARAMS", type=click.Path(path_type=Path))

EXIT_CODES_HELP = """\b
Exit codes:
  0  every gate passed (or the plan was made)
  1  a gate did not pass
  2  bad parameters; nothing was started
  3  waits for approval, or for the maintenance window
  4  interrupted or crashed
"""

COMPLETION_HELP = """\b
Tab completion, for bash (or zsh_source, fish_source):
  eval "$(_RUNBOOK_COMPLETE=bash_source runbook)"
"""


def say(line: str) -> None:
    """Progress on stderr, the symbol in colour where a person looks on."""
    colour = COLOURS.get(line[:1])
    click.echo(click.style(line[0], fg=colour, bold=True) + line[1:] if colour else line, err=True)


def say_nothing(_line: str) -> None:
    """Progress for those who want none."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors of ours speak for themselves; any other is shown whole. The exit code is never Python's own 1."""
    try:
        yield
    except BadInput as error:
        click.echo(str(error).strip("\n"), err=True)
        sys.exit(BAD_INPUT)
    except (GateFailed, RunbookError) as error:
        click.echo(str(error).strip("\n"), err=True)
        sys.exit(GATE_DID_NOT_PASS)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_CODES[Status.INTERRUPTED])
    except psycopg.OperationalError as error:
        click.echo(f"the server was lost: {' '.join(str(error).split())}", err=True)
        sys.exit(CRASHED)
    except click.ClickException:
        raise
    except Exception:
        traceback.print_exc()
        sys.exit(CRASHED)
