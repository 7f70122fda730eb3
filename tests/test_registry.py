"""The names of the steps, and the names that an earlier release gave them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from runbook_lib.cli.main import main
from runbook_lib.core import approval, predecessors, registry
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE, OLD_NAMES, OPERATE, STEPS, UNDO, UNDO_OPERATION
from runbook_lib.core.target import load_params
from tests.conftest import write_params
from tests.small_runs import record_of
from tests.small_runs import run as run  # a fixture

REBUILD, UNDO_REBUILD = "operate/rebuild_index", "undo/rebuild_index"


def test_only_phases_are_numbered_and_every_other_step_had_an_old_name() -> None:
    assert sorted(OLD_NAMES.values()) == sorted({*STEPS} - {*MIGRATE})
    assert all(name[0].isdigit() for name in MIGRATE)
    assert not any(any(c.isdigit() for c in name) for name in (*OPERATE, *UNDO, *UNDO_OPERATION))


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_an_old_name_leads_to_the_new_one(old: str, new: str) -> None:
    assert registry.current(old) == registry.current(new) == new
    assert registry.current(registry.short(new), new.partition("/")[0]) == new
    assert registry.names_in_the_ledger(new) == [new, old]


def test_a_name_without_its_folder_is_the_operation_first() -> None:
    assert registry.current("rebuild_index") == REBUILD
    assert registry.current("rebuild_index", "undo") == UNDO_REBUILD
    assert registry.current("index") == "undo/index"
    assert registry.current("70_tune") == "70_tune"
    assert registry.current("no_such_step") == "no_such_step"


def test_parameters_of_an_earlier_release_are_read(tmp_path: Path) -> None:
    path = write_params(
        tmp_path,
        approval={"phases": ["40_rebuild_index", "90_cut_over"]},
        run={"phase_timeout_minutes": {"10_refresh": 5, "undo_40_rebuild_index": 6, "undo/index": 7}},
    )
    read = load_params(path)
    assert read.approval.phases == [REBUILD, "90_cut_over"]
    assert [read.run.timeout_minutes(n) for n in ("operate/refresh", UNDO_REBUILD, "undo/index")] == [5, 6, 7]
    with pytest.raises(BadInput, match="did you mean operate/refresh"):
        load_params(write_params(tmp_path, run={"phase_timeout_minutes": {"operate/refrech": 5}}))


def test_the_command_line_takes_old_and_short_names(
    articles: psycopg.Connection[Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    run()
    path = str(write_params(tmp_path))
    for name in ("10_refresh", "refresh", "operate/refresh"):
        result, _ = run(first=name, last=name, way="operate", execute=False)
        assert [p.name for p in record_of(result).phases] == ["operate/refresh"]
        assert (result.folder / "operate-refresh.ipynb").is_file()
    for name in ("10_reads_to_legacy", "reads"):
        result, _ = run(last=name, way="undo", execute=False)
        assert [p.name for p in record_of(result).phases] == ["undo/reads"]
    for name in ("40_rebuild_index", "rebuild_index", REBUILD):
        said = CliRunner().invoke(main, ["operate", path, name, "--undo", "--execute"]).output
        assert said.startswith(f"✔ nothing to roll back: {REBUILD} was never carried out")


def test_a_ledger_of_an_earlier_release_is_read(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase(UNDO_REBUILD)
    ledger = phase.ledger
    ledger.create()
    for name in (*MIGRATE, "40_rebuild_index"):
        replace(ledger, phase=name).append("phase", {"verdict": "PASS"})
    assert ledger.phase_verdict(REBUILD) == "PASS"
    assert ledger.last_row(REBUILD)["phase"] == "40_rebuild_index"  # type: ignore[index]
    ledger.append("rebuild", {"was": "there"})
    assert ledger.latest_standing("rebuild", REBUILD) == {"was": "there"}
    since = predecessors.newest_row(ledger)
    assert predecessors.gone(UNDO_REBUILD, ledger, phase.params, since) == ""

    replace(ledger, phase="75_partition_by_filter").append("phase", {"verdict": "PASS"})
    (stands,) = predecessors.gates(UNDO_REBUILD, ledger, phase.params)[:1]
    assert stands.found == "operate/partition_by_filter was carried out since"
    replace(ledger, phase="40_rebuild_index").append("phase", {"verdict": "UNDONE", "by": "undo_40_rebuild_index"})
    assert ledger.latest_standing("rebuild", REBUILD) is None
    assert "40_rebuild_index was undone by undo_40_rebuild_index" in predecessors.gone(
        UNDO_REBUILD, ledger, phase.params, since
    )


def test_a_phase_that_waited_in_an_earlier_release_still_waits(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase(REBUILD)
    phase.ledger.create()
    replace(phase.ledger, phase="approval").append("waits", {"phases": ["40_rebuild_index"]})
    assert approval.waiting_steps(phase.ledger) == {REBUILD}
