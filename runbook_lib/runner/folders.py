"""The folders of runs: a new one for each run, and the oldest removed where the parameters say how many to keep."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.registry import STEPS, current
from runbook_lib.params import Params
from runbook_lib.params.run import RecordSection
from runbook_lib.runner import manifest as manifests
from runbook_lib.runner.manifest import Manifest, Status


def new_folder(record: RecordSection, target: str, kind: str = "") -> Path:
    """The folder of a new run; its name is the run's id. Raises BadInput where it cannot be made."""
    runs_dir = record.runs_dir
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{target}" + (f"-{kind}" if kind else "")
    try:
        runs_dir.mkdir(record.folder_mode, parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput([no_record(runs_dir, error)]) from error
    for n in range(1, 100):
        folder = (runs_dir / (stem if n == 1 else f"{stem}-{n}")).resolve()
        try:
            folder.mkdir(record.folder_mode)
            manifests.write_atomically(folder / manifests.FILE, "")
        except FileExistsError:
            continue
        except OSError as error:
            raise BadInput([no_record(runs_dir, error)]) from error
        return folder
    raise FileExistsError(f"{runs_dir / stem}: a hundred runs in one second")


def no_record(runs_dir: Path, error: OSError) -> Gate:
    """Why no run can be recorded below this folder."""
    return Gate(
        "runner.record_can_be_written",
        Verdict.FAIL,
        str(runs_dir),
        str(error.strerror),
        "a folder with room for the record",
        "what would be done could be read nowhere; nothing was started",
        "make room, or name another folder in record.runs_dir",
    )


def prune(params: Params, run: Manifest) -> bool:
    """Removes the oldest records of an operation that a schedule repeats, where the parameters say how many to keep.

    Only of runs that passed, and never what a link leads to; what they did is in the ledger. Was any removed?
    """
    keep, name = params.record.keep, run.phases[0].name
    if keep is None or not STEPS[name].repeated or run.status != Status.PASSED:
        return False
    runs = manifests.all_runs(params.record.runs_dir)
    mine = ((f, m) for f, m in runs if m.target == run.target and [current(p.name) for p in m.phases] == [name])
    passed = [folder for folder, m in mine if m.status == Status.PASSED]
    for folder in passed[keep:]:
        shutil.rmtree(folder, ignore_errors=True)
    return bool(passed[keep:])
