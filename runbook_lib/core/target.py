"""The target of a run: its params file, read and checked whole."""

from __future__ import annotations

from pathlib import Path

from runbook_lib import params
from runbook_lib.core import redaction
from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.registry import MIGRATE, OPERATE, STEPS, current, waits
from runbook_lib.params import Params
from runbook_lib.params.reading import Problem, Unusable
from runbook_lib.params.run import StepNames

STEP_NAMES = StepNames(current, tuple(STEPS), tuple(name for name in (*MIGRATE, *OPERATE) if waits(name)))


def load_params(path: str | Path) -> Params:
    """Reads and checks one params file, and remembers the secrets that it names.

    Raises BadInput with every problem found: a missing file, an unknown key (with the nearest valid name), a wrong
    type, a value out of range, a step that there is none of.
    """
    try:
        found = params.load(path, STEP_NAMES)
    except Unusable as error:
        # Without its cause, whose text may repeat what was given, be it a secret.
        raise BadInput([_gate(problem) for problem in error.problems]) from None
    redaction.read_with(found)
    return found


def _gate(problem: Problem) -> Gate:
    return Gate(
        f"params.{problem.fact}",
        Verdict.FAIL,
        problem.subject,
        problem.found,
        problem.needed,
        "a misread parameter would act on the wrong thing; nothing was started",
        problem.do or "fix the file and rerun the same command",
    )
