"""Figures held against a limit: whether they keep it, and how both are written so that a message never says the same
of two that differ."""

from __future__ import annotations

import math
from collections.abc import Callable

from runbook_lib.core import display
from runbook_lib.core.display import Amount

# Differences below this are what floating point makes of equal figures.
ROUNDING = 1e-9
# Digits that a message may have beyond those that are usual for its kind of figure.
MOST_MORE_DIGITS = 8
MB = 1024 * 1024

Writer = Callable[[float, int], str]


def at_least(found: float, needed: float) -> bool:
    """Does the figure reach the limit, rounding errors aside?"""
    return found > needed - ROUNDING


def at_most(found: float, limit: float) -> bool:
    """Does the figure stay within the limit, rounding errors aside?"""
    return found < limit + ROUNDING


def apart(found: float, needed: float, write: Writer) -> tuple[str, str]:
    """Both figures in the same number of digits: as few as are usual, and more where they would look alike otherwise.

    write: the figure with so many digits more than usual.
    """
    texts = write(found, 0), write(needed, 0)
    for more in range(1, MOST_MORE_DIGITS + 1):
        if texts[0] != texts[1] or math.isclose(found, needed, rel_tol=0, abs_tol=ROUNDING):
            break
        texts = write(found, more), write(needed, more)
    return texts


def score(value: float, more: int = 0) -> Amount:
    """Recall, nDCG and the like: three digits."""
    return Amount(f"{value:.{3 + more}f}", value)


def change(value: float, more: int = 0) -> str:
    """A difference of two of them, with its sign."""
    return f"{value:+.{3 + more}f}"


def milliseconds(value: float, more: int = 0) -> Amount:
    """A time that a search takes."""
    return Amount(f"{value:.{2 + more}f} ms", value, "ms")


def plain(value: float, more: int = 0) -> str:
    """What parameters give in a digit or two, without zeros at its end."""
    text = f"{value:.{2 + more}f}"
    return text.rstrip("0").rstrip(".")


def percent(share: float, more: int = 0) -> Amount:
    """A share of one as per cent."""
    return Amount(f"{plain(100 * share, more)} %", share, "share")


def size(n_bytes: float, more: int = 0) -> str:
    """Bytes in the unit that keeps the figure short; where that hides a difference, as MB."""
    return f"{n_bytes / MB:,.{more}f} MB" if more else display.size(n_bytes)


def duration(seconds: float, more: int = 0) -> str:
    """Seconds in the unit that people read; where that hides a difference, as seconds."""
    return f"{seconds:.{more}f} s" if more else display.duration(seconds)
