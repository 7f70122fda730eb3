"""Hooks: what they are told and when, and that one that fails changes nothing but the notes."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from runbook_lib.params import Params
from runbook_lib.runner import notify
from runbook_lib.runner.manifest import PhaseRun
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
    """A server on this machine; what is posted to it. Of its paths, /broken answers 500, /moved sends elsewhere,
    where a visit would be written down, /slow sends a byte now and then, and /garbage is no HTTP."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append({"visited": self.path})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/slow":
                with suppress(OSError):
                    for _ in range(60):
                        self.wfile.write(b"H")
                        time.sleep(0.05)
                return
            if self.path == "/garbage":
                self.wfile.write(b"220 ready\r\n")
                return
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/token-of-the-inner-network")
                self.end_headers()
                return
            got.append(json.loads(content))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

        def log_message(self, *_values: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{server.server_port}/token-abc")
    for path in ("broken", "moved", "slow", "garbage"):
        monkeypatch.setenv(f"{path.upper()}_HOOK", f"http://127.0.0.1:{server.server_port}/{path}")
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


@pytest.mark.attack
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
        ({"webhook_env": "GARBAGE_HOOK"}, "notify.webhook_env did not take the event end: BadStatusLine"),
        (
            {"webhook_env": "SLOW_HOOK", "timeout_s": 0.2},
            "notify.webhook_env did not take the event end: no end within 0.2 s",
        ),
        (
            {"webhook_env": "MOVED_HOOK"},
            "notify.webhook_env did not take the event end: HTTP status 302, a redirect, which is not followed",
        ),
        ({"webhook_env": "TWO_LINES"}, "notify.webhook_env did not take the event end: InvalidURL"),
        ({"webhook_env": "HALF_AN_ADDRESS"}, "notify.webhook_env did not take the event end: ValueError"),
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
    monkeypatch.setenv("TWO_LINES", "http://127.0.0.1/token-abc\nX: y")
    monkeypatch.setenv("HALF_AN_ADDRESS", "http://[::1/token-abc")
    assert notify.send(make_params(notify=hook), {"event": "end"}) == [note]
    assert not [event for event in webhook if "visited" in event]
