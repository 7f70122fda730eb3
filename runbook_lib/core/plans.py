"""What a run that only plans leaves: its gates and statements, in the shape of ledger rows, in a file of its folder.

The ledger gets no row of it, and may not even be there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runbook_lib.core.redaction import redacted
from runbook_lib.params import Params

FILE = "plan.jsonl"


def note(params: Params, run_id: str, step: str, kind: str, body: Mapping[str, Any]) -> None:
    """A row for the record of a run that only plans; nothing where somebody steps through by hand."""
    folder = params.record.runs_dir / run_id
    if folder.is_dir():
        row = {"run_id": run_id, "target": params.target.name, "phase": step, "kind": kind, "body": dict(body)}
        mode = folder.stat().st_mode & 0o644
        opened = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode)
        with os.fdopen(opened, "a", encoding="utf-8") as file:
            file.write(json.dumps(redacted(row), ensure_ascii=False, default=str) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows that a run left there; none where it carried its plan out."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
