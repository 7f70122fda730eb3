"""The server of the demo and the tests: started, and waited for."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.cli import embedded


def test_a_server_that_takes_long_to_start_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Path] = []
    get_server = embedded.get_server

    def slow(folder: Path, **options: Any) -> Any:
        tries.append(folder)
        if len(tries) == 1:
            raise subprocess.TimeoutExpired("pg_ctl", 10)
        if len(tries) == 2:
            raise AssertionError("not ready")
        return get_server(folder, **options)

    monkeypatch.setattr(embedded, "get_server", slow)
    with embedded.running(tmp_path / "data") as dsn, psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert len(tries) == 3


def test_it_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("pg_ctl", 10)

    monkeypatch.setattr(embedded, "get_server", never)
    monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.0)
    with pytest.raises(subprocess.TimeoutExpired):
        embedded.start(tmp_path / "data")


def test_its_user_is_made_by_one_start_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []
    most: list[int] = []

    def slow(name: str) -> None:
        inside.append(name)
        time.sleep(0.02)
        most.append(len(inside))
        inside.remove(name)

    monkeypatch.setattr(embedded, "ensure_user_exists", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: embedded._make_user(), range(8)))
    assert most == [1] * 8
