"""kill -9 of kernel, runner and backend at any moment of a real run, while others write: nothing lost or stale.

``runbook run`` and ``runbook operate`` as a scheduler starts them. A round kills each of the three in turn, each in
the run that goes on after the one before; then the same command once more has to pass, and every row is held against
an embedding made again of its text.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import DSN_ENV
from tests.drills import kit, real_runs

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]

ROUNDS = range(20 if kit.FULL else 1)
TEXTS_CHANGED = 300
# What the record says of the run: the runner tells of what it saw, the next run of a runner that was killed.
ENDS = {"kernel": "crashed", "backend": "crashed", "runner": "interrupted"}


@pytest.mark.parametrize("step", real_runs.RUNS)
@pytest.mark.parametrize("turn", ROUNDS)
def test_kill_9_of_kernel_runner_and_backend(
    breakable: str,
    templates: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    turn: int,
) -> None:
    draw = random.Random(f"{kit.SEED} {step} {turn}")
    killed: dict[str, str] = {}
    known: set[str] = set()
    with real_runs.database(breakable, templates(step)) as dsn:
        monkeypatch.setenv(DSN_ENV, dsn)
        monkeypatch.setenv("PYTHONPATH", str(kit.ROOT))
        params = real_runs.params_file(tmp_path)
        with kit.writers(dsn) as written:
            for victim in draw.sample(list(real_runs.KILLS), len(real_runs.KILLS)):
                if step == "refresh":
                    kit.change_texts(dsn, TEXTS_CHANGED)
                with real_runs.begun(step, dsn, params, known) as run:
                    known.add(run.run_id)
                    time.sleep(draw.uniform(0, real_runs.SECONDS[step]))
                    if run.is_at_work(dsn):
                        real_runs.KILLS[victim](run)
                        killed[run.run_id] = victim
                    run.process.wait(kit.LONGEST_STEP_S)
                before = sum(written)
                kit.wait_for(lambda before=before: sum(written) > before, "the writers' return")
        real_runs.passes(step, params)
        assert {r: real_runs.status(params, r) for r in killed} == {r: ENDS[v] for r, v in killed.items()}
        kit.finish(params)
        kit.nothing_is_lost(dsn, *[f"kill -9 of the {victim} in {step}" for victim in killed.values()])
