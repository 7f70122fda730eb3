"""What a run leaves on disk about itself: ``manifest.json``, written atomically, and the list of all runs."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from runbook_lib.core.redaction import redacted
from runbook_lib.core.registry import UNDO_OPERATION

FILE = "manifest.json"
# The way of a run that somebody steps through.
BY_HAND = "by hand"
# Names become files of the run's folder, and of no other.
PHASE_NAME = re.compile(r"((operate|undo)/)?\w+")


class Status(StrEnum):
    """How a run, or one phase of it, stands or ended."""

    PENDING = "pending"
    RUNNING = "running"
    PLANNED = "planned"
    PASSED = "passed"
    FAILED = "failed"
    WAITING = "waiting"
    INTERRUPTED = "interrupted"
    CRASHED = "crashed"


EXIT_CODES = {
    Status.PASSED: 0,
    Status.PLANNED: 0,
    Status.FAILED: 1,
    Status.WAITING: 3,
    Status.INTERRUPTED: 4,
    Status.CRASHED: 4,
}
BAD_INPUT = 2
# What each exit code means, and what a scheduler does about it; help and documents read it here.
MEANINGS = {
    0: ("every gate passed (or the plan was made)", "nothing"),
    1: ("a gate did not pass", "alerts someone; rerunning is safe"),
    2: ("bad parameters, or another run holds the target; nothing was started", "alerts someone"),
    3: ("waits for approval, or for the maintenance window", "alerts the approver, reruns later"),
    4: ("interrupted, crashed, or the record is incomplete", "reruns the same command to resume"),
}

SYMBOLS = {
    Status.PENDING: "·",
    Status.RUNNING: "▸",
    Status.PLANNED: "–",
    Status.PASSED: "✔",
    Status.FAILED: "✘",
    Status.WAITING: "⏸",
    Status.INTERRUPTED: "■",
    Status.CRASHED: "✘",
}


@dataclass(frozen=True)
class PhaseRun:
    """One notebook of a run. error: why it did not pass, in its own words. sha256: of the executed notebook."""

    name: str
    status: str = Status.PENDING
    started: str = ""
    seconds: float | None = None
    error: str = ""
    sha256: str = ""

    @property
    def file(self) -> str:
        """The name of its files in the run's folder, without what they end with."""
        return self.name.replace("/", "-")


@dataclass(frozen=True)
class Manifest:
    """One run. Times are ISO 8601 in UTC; ``parameters`` and everything else is free of secrets.

    user, server: of the operating system, and where the connection led to; empty where they were not noted. head:
    hash of the ledger's row that seals the record; empty where there is none.
    """

    run_id: str
    target: str
    table: str
    way: str
    execute: bool
    status: str
    exit_code: int | None
    started: str
    finished: str
    params_file: str
    parameters: dict[str, Any]
    versions: dict[str, str]
    phases: tuple[PhaseRun, ...]
    notes: tuple[str, ...] = ()
    head: str = ""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    user: str = ""
    server: str = ""

    @property
    def operation(self) -> str:
        """The operation, or the rollback of one, that this run was made for; empty for any other run."""
        name = self.phases[0].name if self.phases else ""
        alone = self.way in ("operate", "undo_operation") or (self.way == "undo" and name in UNDO_OPERATION)
        return name if alone else ""

    @property
    def seconds(self) -> float | None:
        """From start to end; None while it runs."""
        if not self.finished:
            return None
        return (datetime.fromisoformat(self.finished) - datetime.fromisoformat(self.started)).total_seconds()

    def with_phase(self, phase: PhaseRun) -> Manifest:
        """The same run with this phase's newer state."""
        phases = tuple(phase if p.name == phase.name else p for p in self.phases)
        return dataclasses.replace(self, phases=phases)


def os_user() -> str:
    """Who this process belongs to; the number alone where the system has no name for it, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def now() -> str:
    """This second, as manifests write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_atomically(path: Path, content: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never half of it; nor a secret.

    Whoever may read the folder may read the file, and nobody else at any time.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        # A file of our own: where a link was put in its place, whatever it leads to would be overwritten.
        mode = path.parent.stat().st_mode & 0o644
        made = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(made, "w", encoding="utf-8") as file:
            file.write(redacted(content))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write(folder: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json`` into the run's folder."""
    write_atomically(folder / FILE, json.dumps(as_data(manifest), indent=2, ensure_ascii=False) + "\n")


def as_data(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain data, as its file holds it."""
    data = dataclasses.asdict(manifest) | {"seconds": manifest.seconds}
    return dict(redacted(json.loads(json.dumps(data, default=str))))


def read(folder: Path) -> Manifest:
    """Reads it back. Raises OSError, or ValueError where the file is no manifest of this version."""
    try:
        return of_data(json.loads((folder / FILE).read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"{folder / FILE} is not a manifest of this version: {error}") from error


def of_data(data: Any) -> Manifest:
    """The manifest that :func:`as_data` was made from. Raises ValueError where it is none of this version."""
    try:
        data = dict(data)
        data.pop("seconds", None)
        phases = tuple(PhaseRun(**p) for p in data.pop("phases"))
        if odd := next((p.name for p in phases if not PHASE_NAME.fullmatch(p.name)), None):
            raise ValueError(f"{odd!r} is no name of a phase")
        return Manifest(**data | {"phases": phases, "notes": tuple(data["notes"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from error


def all_runs(runs_dir: Path) -> Iterator[tuple[Path, Manifest]]:
    """Every run below this folder that has a readable manifest, newest first.

    Not what a link leads to, nor a manifest that names another run than its folder does: what is written there later
    would be written somewhere else.
    """
    found = []
    for path in runs_dir.glob(f"*/{FILE}"):
        if path.is_symlink() or path.parent.is_symlink():
            continue
        try:
            run = read(path.parent)
        except (OSError, ValueError):
            continue
        if run.run_id == path.parent.name:
            found.append((path.parent, run))
    yield from sorted(found, key=lambda item: (item[1].started, item[1].run_id), reverse=True)


def abandoned(runs_dir: Path, target: str) -> Iterator[tuple[Path, Manifest]]:
    """Runs on this target whose manifest says running though their process on this machine is gone (SIGKILL)."""
    for folder, manifest in all_runs(runs_dir):
        mine = manifest.target == target and manifest.host == socket.gethostname()
        if mine and manifest.status == Status.RUNNING and not _is_alive(manifest.pid):
            yield folder, manifest


def interrupted(manifest: Manifest, why: str) -> Manifest:
    """The manifest of an abandoned run, told as it is: nobody saw its end."""
    phases = tuple(
        dataclasses.replace(p, status=Status.INTERRUPTED, error=why) if p.status == Status.RUNNING else p
        for p in manifest.phases
    )
    return dataclasses.replace(
        manifest,
        status=Status.INTERRUPTED,
        exit_code=EXIT_CODES[Status.INTERRUPTED],
        finished=now(),
        phases=phases,
        notes=(*manifest.notes, why),
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
