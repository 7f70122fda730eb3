"""What reaches a terminal: nothing that it would obey, no secret, and our own colours."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import click
import pytest

from runbook_lib.cli import console
from runbook_lib.core import redaction
from runbook_lib.core.display import Table, plain
from runbook_lib.core.gates import BadInput, Gate, Verdict
from tests.records import make_entries
from tests.test_rundiff import diff, write

# Sets the title, clears the screen, hides, goes back in the line, turns the direction of writing; half a character.
OBEYED = "\x1b]0;owned\x07\x1b[2J\x1b[8m\r\x9b31m\u202etxt\ud800\x00"
SPELT = r"\x1b]0;owned\x07\x1b[2J\x1b[8m\x0d\u009b31m\u202etxt\ud800\x00"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def at_a_terminal() -> Iterator[Terminal]:
    shown = Terminal()
    with redirect_stdout(shown), redirect_stderr(shown):
        yield shown


def test_what_a_terminal_would_obey_is_spelt_out_and_words_of_any_language_stay() -> None:
    assert plain(OBEYED) == SPELT
    words = "größe\tΑθήνα 名前 ✔ 😀\nשלום مرحبا"
    assert plain(words) == words


@pytest.mark.attack
def test_no_command_lets_a_terminal_obey_data_however_it_is_printed() -> None:
    with at_a_terminal() as terminal, console.plain_errors():
        click.echo(OBEYED)
        click.echo(OBEYED, err=True)
        print(OBEYED, file=sys.stderr)
        console.say(f"✔ {OBEYED}")
        logging.StreamHandler().emit(logging.makeLogRecord({"msg": OBEYED}))
    assert terminal.getvalue().count(SPELT) == 5
    assert "\x1b[32m\x1b[1m✔\x1b[0m" in terminal.getvalue(), "the colours of ours are there"
    assert not {"\x07", "\r", "\x9b", "\u202e", "\x00"} & set(terminal.getvalue())


@pytest.mark.attack
@pytest.mark.parametrize(("error", "code"), [(ValueError, 4), (None, 2)])
def test_an_error_is_plain_and_free_of_secrets(
    error: type[Exception] | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redaction, "_secrets", ("sk-planted-4711",))
    said = f"{OBEYED} sk-planted-4711"
    gate = Gate("a.fact_holds", Verdict.FAIL, said, said, said, said, said)
    with at_a_terminal() as terminal, pytest.raises(SystemExit) as left, console.plain_errors():
        raise error(said) if error else BadInput([gate])
    assert left.value.code == code
    assert f"{SPELT} ***" in terminal.getvalue() and "sk-planted" not in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()


def test_work_goes_on_where_nobody_reads_any_more_what_it_says() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1, encoding="utf-8") as unread:
        with redirect_stdout(unread), redirect_stderr(unread), console.plain_errors():
            console.say("✔ 10_baseline")
            print("results")
        with redirect_stdout(unread), pytest.raises(SystemExit) as left, console.plain_errors():
            click.echo("results")
            raise BadInput([Gate("a.fact_holds", Verdict.FAIL, "x", "x", "x", "x", "x")])
    assert left.value.code == 2


@pytest.mark.attack
def test_data_cannot_pass_for_a_gate_or_a_row_of_its_own() -> None:
    forged = "x\nPASS    ledger.chain_is_whole   runbook.entry"
    gate = Gate("record.file_is_known", Verdict.FAIL, forged, forged, forged, forged, forged)
    for line in [*str(gate).splitlines()[1:], *str(Table(("file",), [(forged,)])).splitlines()]:
        assert not line.startswith("PASS")


@pytest.mark.attack
def test_a_comparison_of_notebooks_lets_a_terminal_obey_nothing(tmp_path: Path) -> None:
    one, other = write(tmp_path / "run-a", make_entries(), "same"), write(tmp_path / "run-b", [], OBEYED[:-2])
    shown = diff(one, other).stdout
    assert SPELT.removesuffix(r"\ud800\x00") in shown and not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)
