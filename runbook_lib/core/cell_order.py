"""The order of a notebook's cells: where one is, whether anything may be changed now, and which cell comes next.

Two fences. Whatever changes something asks first (``Phase.opened``), and the sessions of a phase are read-only in the
server until it has asked, so that a module that forgot to ask is refused as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

import psycopg
from psycopg.pq import TransactionStatus

from runbook_lib.core import session
from runbook_lib.core.gates import RunbookError

if TYPE_CHECKING:
    from runbook_lib.core import db

T = TypeVar("T")

# Titles of the notebooks' sections; the tests hold every notebook to them.
OPEN, REQUIRE, PLAN, PROVE = "Where am I", "Must be true first", "What will be done", "Must be true now"
CLOSE = "What comes next, and rolling back"
# Of long work, the ledger is asked at most so often whether what it relies on still holds.
SECONDS_BETWEEN_QUESTIONS = 1.0


class OutOfOrder(RunbookError):
    """A cell came before its turn or after the end, and nothing was changed. One line: where one is, what is next."""

    changed = "nothing was changed"

    def __init__(self, where: str, following: str) -> None:
        super().__init__(found=where, needed="", danger="", do=following)

    def __str__(self) -> str:
        return f"{self.found}; {self.changed}. Next: {self.do}."

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class ConnectionLost(OutOfOrder):
    """The server has ended a session of the phase, and the claim on the target with it."""

    changed = "what was committed before stays"


def cell(title: str) -> str:
    """A cell by the section of the notebook that it is in."""
    return f"the cell below “{title}”"


@dataclass
class Order:
    """How far one session has come with one notebook.

    required: the gates of the way here have passed. unproved: looks that were begun or failed, and have not passed
    since, with what they said. proved: a look has passed since the last change. ended: why its connections may not be
    used any more; then ``following`` says what comes next. depth: calls that hold the session open for writing.
    """

    name: str
    required: bool = False
    unproved: dict[str, str] = field(default_factory=dict)
    looking: int = 0
    proved: bool = False
    ended: str = ""
    following: str = ""
    depth: int = 0
    fenced: bool = False
    recheck: Callable[[], str] | None = None
    asked: float = float("-inf")

    def fence(self, connection: db.Connection) -> None:
        """Makes the session read-only in the server, until the phase is opened for a change."""
        connection.execute(session.READ_ONLY, ["on"])
        self.fenced = True

    @contextmanager
    def lifted(self, connection: db.Connection) -> Iterator[None]:
        """The same session, writing; the outermost of nested calls puts the fence up again."""
        if self.fenced and not self.depth:
            connection.execute(session.READ_ONLY, ["off"])
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.fenced and not self.depth and connection.info.transaction_status == TransactionStatus.IDLE:
                with suppress(psycopg.Error):
                    connection.execute(session.READ_ONLY, ["on"])

    def end(self, why: str, following: str) -> None:
        """From here on the phase hands out no connection."""
        self.ended, self.following = why, following

    def must_be_open(self) -> None:
        """Raises OutOfOrder for a phase that was closed or let go."""
        if self.ended:
            raise OutOfOrder(self.ended, self.following)

    def must_be_required(self) -> None:
        """Raises OutOfOrder where the gates of the way here have not passed in this session."""
        self.must_be_open()
        if not self.required:
            failed = self.unproved.get(REQUIRE)
            if failed:
                raise OutOfOrder(f"{self.name} is open, and {failed}", f"put that right, then run {cell(REQUIRE)}")
            raise OutOfOrder(f"{self.name} is open, and its gates have not passed in this session", cell(REQUIRE))

    def must_have_passed(self) -> None:
        """Raises OutOfOrder where a gate has not passed in this session, whichever it was."""
        self.must_be_required()
        if self.unproved:
            said = next(iter(self.unproved.values()))
            raise OutOfOrder(f"{self.name} is open, and {said}", f"put that right, then run {cell(REQUIRE)}")

    @contextmanager
    def look(self, name: str) -> Iterator[None]:
        """While a look is under way, and after one that failed or was interrupted, nothing may be changed."""
        self.unproved[name] = f"{name} has not come to its end"
        self.looking += 1
        try:
            yield
        finally:
            self.looking -= 1

    def asks_now(self, every_s: float) -> bool:
        """Is it time to ask the ledger again?"""
        now = time.monotonic()
        if now - self.asked < every_s:
            return False
        self.asked = now
        return True


def said(failed: Iterable[str]) -> str:
    """What did not pass, in words."""
    return f"{', '.join(failed)} did not pass"


class WhileOpen(Generic[T]):
    """A field of a phase, handed out only while the phase is open and connected; else it raises OutOfOrder."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.kept = f"_{name}"

    @overload
    def __get__(self, phase: None, owner: type) -> Self: ...
    @overload
    def __get__(self, phase: Any, owner: type) -> T: ...
    def __get__(self, phase: Any, owner: type) -> Self | T:
        if phase is None:
            raise AttributeError(self.kept)  # so that a dataclass takes this for a field without a default
        phase.order.must_be_open()
        value = phase.__dict__[self.kept]
        if getattr(getattr(value, "connection", value), "closed", False):
            raise ConnectionLost(f"{phase.name} has lost its connection to the server", cell(OPEN))
        return value  # type: ignore[no-any-return]

    def __set__(self, phase: Any, value: T) -> None:
        phase.__dict__[self.kept] = value
