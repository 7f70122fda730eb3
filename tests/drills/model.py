"""The toy model, as slow as a small real one: there is time to kill whoever asks it."""

import time

import numpy as np

from tests import toy

SECONDS_A_BATCH = 0.02


def slowly(texts: list[str]) -> np.ndarray:
    """As ``toy.embed``, after a while."""
    time.sleep(SECONDS_A_BATCH)
    return toy.embed(texts)
