"""Options of a vector index, by name: as the parameters ask for them, as it has them, as a reader sees them."""

from __future__ import annotations

from collections.abc import Sequence

from runbook_lib.params import Params

Options = dict[str, int]


def asked_for(params: Params) -> Options:
    """What the parameters ask for; lists only where they are given."""
    i = params.index
    if i.method == "hnsw":
        return {"m": i.m, "ef_construction": i.ef_construction}
    return {"lists": i.lists} if i.lists else {}


def stored(reloptions: Sequence[str]) -> Options:
    """Of an index as pg_class has them; pgvector's defaults are not written there, and the runbook writes its own."""
    return {name: int(value) for name, _, value in (o.partition("=") for o in reloptions) if value.isdigit()}


def listed(options: Options) -> str:
    """As a reader sees them; empty where there are none."""
    return ", ".join(f"{name} {value}" for name, value in options.items())
