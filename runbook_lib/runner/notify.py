"""Tells somebody: a command of the site's own, and a webhook. A hook that fails is noted and changes nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from runbook_lib.core.redaction import redacted, remember_url
from runbook_lib.params import Params
from runbook_lib.runner.manifest import Manifest, Status

# What is told besides the end, which always is.
EVENTS = {Status.FAILED: "gate_failed", Status.WAITING: "approval_wanted"}
END = "end"


def of_run(params: Params, run: Manifest, folder: Path) -> list[str]:
    """Tells the end of a run that carried something out, and before it what it stopped at; returns what failed."""
    if not run.execute:
        return []
    stopped = next((p for p in run.phases if p.error), None)
    event: dict[str, Any] = {
        "run_id": run.run_id,
        "target": run.target,
        "table": run.table,
        "way": run.way,
        "status": run.status,
        "exit_code": run.exit_code,
        "phase": stopped.name if stopped else None,
        "message": stopped.error if stopped else "",
        "record": str(folder / "index.html"),
        "at": run.finished,
    }
    first = EVENTS.get(Status(run.status))
    if first == "approval_wanted" and stopped and stopped.name not in params.approval.phases:
        first = "outside_window"
    return [note for name in (first, END) if name for note in send(params, {"event": name} | event)]


def send(params: Params, event: dict[str, Any]) -> list[str]:
    """Sends one event to every hook; returns a note for each that failed, free of the URL, which is a secret."""
    content = json.dumps(redacted(event), ensure_ascii=False).encode()
    notes = []
    if params.notify.command and (why := _by_command(params, content)):
        notes.append(f"notify.command did not take the event {event['event']}: {why}")
    if params.notify.webhook_env and (why := _by_webhook(params, params.notify.webhook_env, content)):
        notes.append(f"notify.webhook_env did not take the event {event['event']}: {why}")
    return notes


def _by_command(params: Params, content: bytes) -> str:
    """Its output is dropped: the command knows secrets that the record must not."""
    try:
        done = subprocess.run(  # noqa: S603 - the site's own command, without a shell
            params.notify.command,
            input=content,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=params.notify.timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {params.notify.timeout_s:g} s"
    except OSError as error:
        return error.strerror or type(error).__name__
    return f"exit code {done.returncode}" if done.returncode else ""


def _by_webhook(params: Params, name: str, content: bytes) -> str:
    url = os.environ.get(name, "").strip()
    remember_url(url)
    if not url:
        return f"{name} is not set"
    if not url.lower().startswith(("http://", "https://")):
        return f"{name} is not an http or https address"
    said: list[str] = []
    timeout_s = params.notify.timeout_s
    # On a thread: the timeout of a socket begins again with every byte, and a name's look-up has none.
    thread = threading.Thread(target=lambda: said.append(_post(url, content, timeout_s)), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return said[0] if said else f"no end within {timeout_s:g} s"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The address is the operator's choice; where its server would send us is not."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str, content: bytes, timeout_s: float) -> str:
    headers = {"Content-Type": "application/json"}
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        request = urllib.request.Request(url, content, headers, method="POST")  # noqa: S310 - checked by the caller
        with opener.open(request, timeout=timeout_s):
            return ""
    except urllib.error.HTTPError as error:
        followed = ", a redirect, which is not followed" if 300 <= error.code < 400 else ""
        return f"HTTP status {error.code}{followed}"
    except (OSError, ValueError, HTTPException) as error:
        # Without its text, in which the address may stand.
        return type(getattr(error, "reason", error)).__name__
