"""How much of a long text a model reads: measured, since most cut the rest off without a word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runbook_lib.core.gates import BadInput
from runbook_lib.embeddings import endpoint
from runbook_lib.embeddings.embedding import Model

# Two texts of ordinary words that have none in common, so that a model which reads a word of them tells them apart.
FIRST = "harbour lantern copper meadow winter carpet silver thunder garden pepper "
OTHER = "violin granite orchard velvet canyon marble saddle falcon timber anchor "
# Models that read less than this are not in use.
SHORTEST_LIMIT = 500
# Looking for a limit beyond this would cost more than it tells.
LONGEST_PROBE = 100_000
# How near two numbers of a vector at length 1 may be and count as one, by what rounding leaves.
SAME = 1e-6
# The limit is looked for to a hundredth.
PRECISION = 0.01


@dataclass(frozen=True)
class Read:
    """characters: of a text, its first ones, that the model reads; None where it read all that it was tried with.
    refuses: a longer text is an error to it."""

    characters: int | None
    refuses: bool = False

    def unread(self, length: int) -> int:
        """Characters of a text of that length that it never reads."""
        return 0 if self.characters is None else max(0, length - self.characters)

    def __str__(self) -> str:
        if self.characters is None:
            return "the model reads all of a text"
        rest = "refuses a longer one" if self.refuses else "drops the rest"
        return f"the model reads about the first {self.characters:,} characters of a text and {rest}"


def measured(ask: Model, longest: int) -> Read:
    """Asks the model for made-up texts of up to that many characters: no text of the table leaves for this.

    Two texts that differ from some character on have one vector where the model stops before it.
    """
    longest = min(longest, LONGEST_PROBE)
    if longest <= SHORTEST_LIMIT:
        return Read(None)
    refuses = not _takes(ask, longest)

    def read(n: int) -> bool:
        return _takes(ask, n) if refuses else _reads_past(ask, n, longest)

    low, high = 0, longest
    if not refuses and read(longest - max(1, round(longest * PRECISION))):
        return Read(None)
    while high - low > max(1, PRECISION * high):
        middle = (low + high) // 2
        low, high = (middle, high) if read(middle) else (low, middle)
    return Read(high, refuses)


def _filled(words: str, length: int) -> str:
    return (words * (length // len(words) + 1))[:length]


def _reads_past(ask: Model, n: int, length: int) -> bool:
    head = _filled(FIRST, n)
    one, other = ask([head + _filled(words, length - n) for words in (FIRST, OTHER)])
    scale = max(float(np.linalg.norm(one)), float(np.finfo(np.float32).tiny))
    return not bool(np.allclose(one / scale, other / scale, rtol=0, atol=SAME))


def _takes(ask: Model, length: int) -> bool:
    try:
        ask([_filled(FIRST, length)])
    except (BadInput, endpoint.EndpointAway):
        raise
    # The model may be the user's own, and fail in any way.
    except Exception:
        return False
    return True
