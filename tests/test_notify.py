"""Hooks: what they are told and when, and that one that fails changes nothing but the notes."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from runbook_lib.params import Params
from runbook_lib.running import notify
from runbook_lib.running.manifest import PhaseRun
from tests.records import make_manifest

FOLDER = Path("/runs/x")


@pytest.fixture
def told(tmp_path: Path) -> tuple[list[str], Callable[[], list[dict[str, Any]]]]:
    """A command that writes down what it is told, and a reader of that."""
    log = tmp_path / "events.jsonl"
    code = f"import sys; open({str(log)!r}, 'a').write(sys.stdin.read() + '\\n')"
    return [sys.executable, "-c", code], lambda: [json.loads(x) for x in log.read_text().splitlines()]


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A server on this machine; what is posted to it. Answers 500 to a path /broken."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

        def log_message(self, *_values: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{server.server_port}/token-abc")
    monkeypatch.setenv("BROKEN_HOOK", f"http://127.0.0.1:{server.server_port}/broken")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield got
    server.shutdown()


def stopped(status: str, error: str, phase: str = "90_cut_over", **changes: Any) -> Any:
    return make_manifest(status=status, phases=(PhaseRun(phase, status, error=error),), **changes)


def test_both_hooks_hear_the_gate_and_then_the_end(
    make_params: Callable[..., Params], told: Any, webhook: list[dict[str, Any]]
) -> None:
    command, events = told
    p = make_params(notify={"command": command, "webhook_env": "HOOK"})
    assert notify.of_run(p, stopped("failed", "FAIL  x", exit_code=1), FOLDER) == []
    assert events() == webhook
    assert [e["event"] for e in webhook] == ["gate_failed", "end"]
    assert webhook[0] == {
        "event": "gate_failed",
        "run_id": "20261122T190501Z-articles",
        "target": "articles",
        "table": "public.articles",
        "way": "migrate",
        "status": "failed",
        "exit_code": 1,
        "phase": "90_cut_over",
        "message": "FAIL  x",
        "record": "/runs/x/index.html",
        "at": "2026-11-22T19:05:54+00:00",
    }


@pytest.mark.parametrize(
    ("status", "phases", "events"),
    [
        ("waiting", ["90_cut_over"], ["approval_wanted", "end"]),
        ("waiting", [], ["outside_window", "end"]),
        ("passed", [], ["end"]),
        ("crashed", [], ["end"]),
    ],
)
def test_each_end_has_its_events(
    make_params: Callable[..., Params], told: Any, status: str, phases: list[str], events: list[str]
) -> None:
    command, read = told
    p = make_params(notify={"command": command}, approval={"phases": phases})
    notify.of_run(p, stopped(status, "why" if status != "passed" else ""), FOLDER)
    assert [e["event"] for e in read()] == events


def test_a_plan_tells_nobody(make_params: Callable[..., Params]) -> None:
    assert notify.of_run(make_params(notify={"command": ["/no/such"]}), make_manifest(execute=False), FOLDER) == []


@pytest.mark.parametrize(
    ("hook", "note"),
    [
        ({"command": ["/no/such/program"]}, "notify.command did not take the event end: No such file or directory"),
        ({"command": [sys.executable, "-c", "exit(7)"]}, "notify.command did not take the event end: exit code 7"),
        (
            {"command": [sys.executable, "-c", "import time; time.sleep(9)"], "timeout_s": 0.2},
            "notify.command did not take the event end: no end within 0.2 s",
        ),
        ({"webhook_env": "NOT_THERE"}, "notify.webhook_env did not take the event end: NOT_THERE is not set"),
        ({"webhook_env": "BROKEN_HOOK"}, "notify.webhook_env did not take the event end: HTTP status 500"),
        ({"webhook_env": "NOBODY"}, "notify.webhook_env did not take the event end: ConnectionRefusedError"),
        (
            {"webhook_env": "NO_URL"},
            "notify.webhook_env did not take the event end: NO_URL is not an http or https address",
        ),
    ],
)
def test_a_hook_that_fails_is_a_note_without_its_secret(
    make_params: Callable[..., Params],
    webhook: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    hook: dict[str, Any],
    note: str,
) -> None:
    monkeypatch.setenv("NOBODY", "http://127.0.0.1:1/token-abc")
    monkeypatch.setenv("NO_URL", "file:///etc/token-abc")
    assert notify.send(make_params(notify=hook), {"event": "end"}) == [note]
