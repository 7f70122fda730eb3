"""%sql and %%sql read on a connection of the phase's own, and on no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from runbook_lib.core import sqlmagic
from runbook_lib.core.phase import Phase
from tests.small_runs import wait_until

DISPLAYS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'runbook test-run display'"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    monkeypatch.setattr(sqlmagic, "get_ipython", lambda: shell)
    yield shell
    sqlmagic.let_go()
    shell.restore_sys_module_state()


def read(shell: InteractiveShell, query: str) -> Any:
    """The one value that a cell shows."""
    ((value,),) = shell.run_cell_magic("sql", "", query)  # type: ignore[no-untyped-call]
    return value


def test_a_connection_of_another_role_is_refused_each_time_and_let_go(
    shell: InteractiveShell, open_phase: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = open_phase()
    phase.connection.execute("SET ROLE pg_monitor")
    sqlmagic.connect(phase.params, phase.run_id, lambda: phase.connection)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the display connection is on .*, the phase on .*'pg_monitor'"):
            read(shell, "SELECT 1 AS one")
        wait_until(lambda: articles.execute(DISPLAYS).fetchall() == [], 10)
    phase.connection.execute("RESET ROLE")
    assert read(shell, "SELECT 1 AS one") == 1


def test_the_next_phase_of_a_kernel_reads_by_its_own_connection(
    shell: InteractiveShell, open_phase: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    seen = []
    for column in ("embedding", "other"):
        phase = open_phase(vector={"column": column})
        sqlmagic.connect(phase.params, phase.run_id, lambda phase=phase: phase.connection)
        pid = read(shell, "SELECT pg_backend_pid()")
        assert pid == read(shell, "SELECT pg_backend_pid()")
        wait_until(lambda pid=pid: articles.execute(DISPLAYS).fetchall() == [(pid,)], 10)  # that before has ended
        seen.append((pid, read(shell, "SELECT current_setting('runbook.index')")))
    assert len(set(seen)) == 2 and ["other" in index for _, index in seen] == [False, True]
    with pytest.raises(Exception, match="read-only transaction"):
        read(shell, "DELETE FROM articles")
