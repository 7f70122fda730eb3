"""Consents of the params file that name nothing: a mistyped one would pass for a consent that was never needed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("consent")


def check(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """A gate for each list of ``accept`` that names something."""
    there = db.one(connection, SQL["names"], params, table=spelled(params, "table"))
    table = spelled(params, "table")
    for kind, where in (
        ("triggers", f"a trigger of {table}"),
        ("rules", f"a rule of {table}"),
        ("publications", "a publication of this database"),
        ("open_schemas", "a schema of this database"),
    ):
        if given := getattr(params.accept, kind):
            yield _all_exist(kind, where, given, there[kind])


def _all_exist(kind: str, where: str, given: Sequence[str], there: Sequence[str]) -> Gate:
    unknown = [name for name in given if name not in there]
    near = {name: difflib.get_close_matches(name, there, n=1, cutoff=0.5) for name in unknown}
    do = "; ".join(
        f"did you mean {near[name][0]}?" if near[name] else f"take {name} out of accept.{kind}" for name in unknown
    )
    return gate(
        "inputs.accepted_names_exist",
        not unknown,
        f"accept.{kind}",
        found=f"not {where}: {', '.join(unknown)}" if unknown else f"{', '.join(given)}: agreed to",
        needed=f"each name {where}",
        danger="a consent that names nothing covers nothing, and what it was meant for is not agreed to",
        do=do,
    )
