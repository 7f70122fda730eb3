"""What a sign-off is bound to besides statements and parameters: the files that decide what a phase does."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import runbook_lib
from runbook_lib.core.registry import notebook, notebooks
from runbook_lib.params import Params

MISSING = "not there"
LIBRARY = f"runbook_lib {runbook_lib.__version__}"


def of(params: Params, phase: str) -> dict[str, str]:
    """SHA-256 of the notebook, the library, and each input file, by what it is; ``not there`` where one is not."""
    files = {what: path for what, path in _files(params, phase) if path is not None}
    return {what: _sha256(path) for what, path in files.items()} | {LIBRARY: _library()}


def _files(params: Params, phase: str) -> Iterator[tuple[str, Path | None]]:
    yield f"notebook {phase}", notebooks() / notebook(phase)
    e, q = params.embeddings, params.queries
    yield "embeddings.file", e.file
    yield "embeddings.ids_file", e.ids_file
    yield "queries.file", q.file
    yield "queries.judgements", q.judgements
    yield "queries.embeddings", q.embeddings
    yield "model_change.replaces_params", params.model_change.replaces_params
    if e.callable:
        try:
            spec = importlib.util.find_spec(str(e.callable).partition(":")[0])
        except (ImportError, ValueError):
            spec = None
        yield "embeddings.callable", Path(spec.origin if spec and spec.origin else MISSING)


def _sha256(path: Path) -> str:
    try:
        if path.suffix == ".ipynb":  # what its cells say; ids and outputs carry nothing out
            cells = json.loads(path.read_text("utf-8"))["cells"]
            return hashlib.sha256(json.dumps([c["source"] for c in cells]).encode()).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError):
        return MISSING


@cache
def _library() -> str:
    """One hash over the library's own code and statements."""
    root = Path(runbook_lib.__file__).parent
    found = sorted(p for suffix in ("py", "sql", "j2") for p in root.rglob(f"*.{suffix}"))
    return hashlib.sha256("".join(f"{p.relative_to(root)} {_sha256(p)}\n" for p in found).encode()).hexdigest()
