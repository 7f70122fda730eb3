"""Gates: facts that must hold, each with a verdict; and the errors, which speak as gates do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from runbook_lib.core.display import Table, frame_of, one_line
from runbook_lib.core.redaction import redacted

if TYPE_CHECKING:
    import pandas


class Verdict(StrEnum):
    """What a gate found. Only PASS opens the next phase; WOULD PASS, in a plan, holds today."""

    PASS = "PASS"  # noqa: S105 - a verdict, not a password
    FAIL = "FAIL"
    UNKNOWN = "UNKNOWN"
    NOT_RUN = "NOT RUN"
    WOULD_PASS = "WOULD PASS"  # noqa: S105


SYMBOLS = {
    Verdict.PASS: "✔",
    Verdict.FAIL: "✘",
    Verdict.UNKNOWN: "?",
    Verdict.NOT_RUN: "–",
    Verdict.WOULD_PASS: "○",
}
STOPPING = (Verdict.FAIL, Verdict.UNKNOWN)


@dataclass(frozen=True)
class Gate:
    """One fact that must hold.

    name: ``module.fact_that_must_hold``. subject: what it is about, for instance a table.
    figures: the numbers behind the verdict, in the units that their keys name; they go into the ledger.
    """

    name: str
    verdict: Verdict
    subject: str
    found: str
    needed: str
    danger: str = ""
    do: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.verdict + ' ':<8}{self.name}   {one_line(self.subject)}"]
        parts = {"found": self.found, "needed": self.needed}
        if self.verdict in STOPPING:
            parts |= {"danger": self.danger, "do": self.do}
        return "\n".join(lines + _said(parts))


def _said(parts: Mapping[str, str]) -> list[str]:
    """A line a part. What data quotes stays in its part: a line of its own could pass for another gate."""
    return [f"  {key:<8}" + redacted(text).replace("\n", "\n" + " " * 10) for key, text in parts.items() if text]


def gate(
    name: str,
    holds: bool | None,
    subject: str,
    *,
    found: object,
    needed: object,
    danger: str = "",
    do: str = "",
    figures: Mapping[str, Any] | None = None,
) -> Gate:
    """A gate from the answer to its question: True is PASS, False is FAIL, None (could not look) is UNKNOWN."""
    verdict = Verdict.UNKNOWN if holds is None else Verdict.PASS if holds else Verdict.FAIL
    return Gate(name, verdict, subject, str(found), str(needed), danger, do, figures or {})


def not_run(name: str, subject: str, found: str, needed: str) -> Gate:
    """The gate of a plan that cannot be judged yet. found: the step after which it will be known."""
    return Gate(name, Verdict.NOT_RUN, subject, found, needed)


@dataclass(frozen=True)
class Gates:
    """An ordered set of gates; shows itself as a table, in a notebook with symbol and colour."""

    gates: tuple[Gate, ...]

    def __iter__(self) -> Iterator[Gate]:
        return iter(self.gates)

    def __len__(self) -> int:
        return len(self.gates)

    def __add__(self, other: Gates) -> Gates:
        return Gates(self.gates + other.gates)

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that stop the run: FAIL and UNKNOWN. NOT RUN and WOULD PASS stop nothing and open nothing."""
        return tuple(g for g in self.gates if g.verdict in STOPPING)

    @property
    def passed(self) -> bool:
        """True only if there is a gate and every gate says PASS."""
        return bool(self.gates) and all(g.verdict is Verdict.PASS for g in self.gates)

    def in_a_plan(self) -> Gates:
        """The same gates for a run that carries nothing out: those that hold say WOULD PASS."""
        return Gates(
            tuple(replace(g, verdict=Verdict.WOULD_PASS) if g.verdict is Verdict.PASS else g for g in self.gates)
        )

    def to_frame(self) -> pandas.DataFrame:
        """One row per gate; each figure is a column, such as ``figures.recall``, in the unit that it names."""
        return frame_of({**vars(g), "verdict": str(g.verdict)} for g in self.gates)

    def __str__(self) -> str:
        return "\n".join(str(g) for g in self.gates)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        # Where all is well, danger and do would be two empty columns.
        advice = bool(self.failed)
        return Table(
            ("", "gate", "subject", "found", "needed", *(("danger", "do") if advice else ())),
            [
                (
                    # Held together by no-break spaces.
                    f"{SYMBOLS[g.verdict]} {g.verdict}".replace(" ", "\u00a0"),
                    g.name,
                    g.subject,
                    g.found,
                    g.needed,
                    *(((g.danger, g.do) if g in self.failed else ("", "")) if advice else ()),
                )
                for g in self.gates
            ],
            row_classes=[f"gate-{g.verdict.lower().replace(' ', '-')}" for g in self.gates],
        )._repr_html_()


def collect(gates: Iterable[Gate]) -> Gates:
    """Gates from any iterable, so that a check can be written as a generator."""
    return Gates(tuple(gates))


class RunbookError(Exception):
    """What went wrong, in the words of a gate. Nothing has been changed unless ``found`` says so."""

    def __init__(self, found: str, needed: str, danger: str, do: str) -> None:
        super().__init__(found, needed, danger, do)
        self.found, self.needed, self.danger, self.do = found, needed, danger, do

    def _render_traceback_(self) -> list[str]:
        """What a notebook and papermill's log show: the message. The way through this library tells a DBA nothing."""
        return [f"{type(self).__name__}: the notebook stops here.", *str(self).strip("\n").splitlines()]

    def __str__(self) -> str:
        parts = {"found": self.found, "needed": self.needed, "danger": self.danger, "do": self.do}
        return "\n" + "\n".join(_said(parts))


class BadInput(RunbookError):
    """Parameters, files or a server that the runbook cannot work with; found before anything was changed.

    problems: every one found, each as a gate with verdict FAIL, so that all can be fixed at once.
    """

    def __init__(self, problems: Iterable[Gate]) -> None:
        self.problems = Gates(tuple(problems))
        first = self.problems.gates[0]
        super().__init__(first.found, first.needed, first.danger, first.do)

    def __str__(self) -> str:
        return "\n" + str(self.problems)


class GateFailed(RunbookError):
    """At least one gate did not pass; the phase stops here and can be run again.

    shown: are the gates right above it, in the notebook? Then it repeats only which failed, and what to do.
    """

    def __init__(self, gates: Gates, *, shown: bool = False) -> None:
        self.gates, self.shown = gates, shown
        first = gates.failed[0]
        super().__init__(first.found, first.needed, first.danger, first.do)

    def __str__(self) -> str:
        return "\n" + "\n".join(str(g) for g in self.gates.failed)

    def _render_traceback_(self) -> list[str]:
        if not self.shown:
            return super()._render_traceback_()
        told = [
            line
            for g in self.gates.failed
            for line in (f"{g.verdict:<8}{g.name}   {one_line(g.subject)}", *_said({"do": g.do}))
        ]
        return [f"{type(self).__name__}: the notebook stops here.", *told]


class LockNotObtained(RunbookError):
    """A statement waited for its lock as often and as long as the parameters allow, and was not carried out."""


class PausedTooLong(RunbookError):
    """The server's health, or a DBA, held the backfill for longer than the parameters allow; it can be run again."""


class NotApproved(RunbookError):
    """A phase that the parameters name for sign-off has none that fits its plan and evidence."""


class OutsideWindow(RunbookError):
    """Work that changes something was asked for outside the maintenance window."""
