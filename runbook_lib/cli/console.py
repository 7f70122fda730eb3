"""What every command shares: results on stdout, progress and errors on stderr, and exit codes. Commands import their
modules when they are called, which takes a second that `--help` and the Tab key need not spend.
"""

from __future__ import annotations

import csv
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from runbook_lib.cli import completion
from runbook_lib.core.redaction import redacted
from runbook_lib.runner.manifest import BAD_INPUT, EXIT_CODES, MEANINGS, Status

GATE_DID_NOT_PASS = EXIT_CODES[Status.FAILED]
CRASHED = EXIT_CODES[Status.CRASHED]
COLOURS = {"✔": "green", "✘": "red", "■": "yellow", "⏸": "yellow"}

PARAMS = click.argument(
    "params_file", metavar="PARAMS", type=click.Path(path_type=Path), shell_complete=completion.params_files
)

EXIT_CODES_HELP = "\b\nExit codes:\n" + "".join(f"  {code}  {meaning}\n" for code, (meaning, _) in MEANINGS.items())


def say(line: str) -> None:
    """Progress on stderr, the symbol in colour where a person looks on."""
    if colour := COLOURS.get(line[:1]):
        echo_styled(click.style(line[0], fg=colour, bold=True), sys.stderr, nl=False)
        line = line[1:]
    click.echo(line, err=True)


def echo_styled(text: str, stream: TextIO, *, nl: bool = True) -> None:
    """Writes what holds colours of ours, and of data only what is plain."""
    styled = stream.stream if isinstance(stream, _Plain) else stream
    with _whether_or_not_read(styled):
        click.echo(redacted(text), file=styled, nl=nl)


def names_in(text: str) -> tuple[str, ...]:
    """Names between commas, ``-`` for none; one that has a comma itself stands in double quotes."""
    parts = next(csv.reader([text], skipinitialspace=True), [])
    return tuple(part.strip() for part in parts if part.strip() not in ("", "-"))


def say_nothing(_line: str) -> None:
    """Progress for those who want none."""


@contextmanager
def _whether_or_not_read(stream: TextIO) -> Iterator[None]:
    """Where the reader of a pipe has left, as `head` does, what is said is lost, never the work."""
    try:
        yield
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Plain:
    """A stream that writes no secret, and nothing that a terminal would obey, whoever prints."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        from runbook_lib.core.display import plain

        with _whether_or_not_read(self.stream):
            self.stream.write(plain(redacted(text)))
        return len(text)

    def flush(self) -> None:
        with _whether_or_not_read(self.stream):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _plain_output() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Plain(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors of ours speak for themselves; any other is shown whole. The exit code is never Python's own 1.

    Whatever is printed inside is free of secrets and of control characters.
    """
    with _plain_output(), _exit_codes():
        yield


@contextmanager
def _exit_codes() -> Iterator[None]:
    import psycopg

    from runbook_lib.core.gates import BadInput, GateFailed, RunbookError

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


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that the record is made either way."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
