"""What is refused before a step is opened: parameters that its notebook does not have, a switch that is none, and a
table that it does not work on.
"""

from __future__ import annotations

import ast
import difflib

from IPython.core.getipython import get_ipython

from runbook_lib.core import table_kind
from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.registry import STEPS
from runbook_lib.params import Params

# What every notebook has in its cell of parameters.
PARAMETERS = ("params_file", "run_id", "execute")
# How papermill, and a scheduler that uses it, begins the cell of the parameters that it was given.
INJECTED = "# Parameters\n"


def refuse_unknown_parameters() -> None:
    """Papermill sets a mistyped name without an error. Raises BadInput for one that the notebook does not have."""
    unknown, names = _unknown_parameters()
    if unknown:
        raise BadInput([_unknown_parameter(name, names) for name in unknown])


def _unknown_parameter(name: str, names: list[str]) -> Gate:
    near = difflib.get_close_matches(name, names, n=1)
    return Gate(
        "params.notebook_has_it",
        Verdict.FAIL,
        name,
        "the notebook has no such parameter",
        f"one of {', '.join(PARAMETERS)}",
        "the notebook would run with its defaults, on another target or without changing anything",
        f"did you mean {near[0]}?" if near else "leave it out",
    )


def refuse_distributed(name: str, params: Params) -> None:
    """Raises BadInput for a step that does not work on a table whose rows lie on other servers."""
    why = STEPS[name].one_server if name in STEPS else ""
    if why and table_kind.of(params).name:
        problem = Gate(
            "step.works_on_a_distributed_table",
            Verdict.FAIL,
            name,
            f"a table that {table_kind.of(params).name} distributes",
            "a table of one server",
            f"{why}; nothing was started",
            "leave it out: phases, operate/refresh, operate/monitor and every rollback of a phase work on Citus",
        )
        raise BadInput([problem])


def _unknown_parameters() -> tuple[list[str], list[str]]:
    """The parameters that papermill set and no cell above has, and all that could be meant."""
    names, unknown = list(PARAMETERS), dict[str, None]()
    for cell in getattr(get_ipython(), "user_ns", {}).get("In", ()):
        assigned = _assigned(cell)
        if cell.startswith(INJECTED):
            unknown = dict.fromkeys(name for name in assigned if name not in names)
        else:
            names += assigned
    return list(unknown), names


def _assigned(cell: str) -> list[str]:
    try:
        statements = ast.parse(cell).body
    except (SyntaxError, ValueError):
        return []
    targets = [t for s in statements if isinstance(s, ast.Assign) for t in s.targets]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def as_boolean(value: bool | str) -> bool:
    """A switch, also as the text that a command line gives. Raises BadInput for anything else."""
    if isinstance(value, bool):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    problem = Gate(
        "params.value_is_valid",
        Verdict.FAIL,
        "execute",
        repr(value),
        "true or false",
        "a misread switch would change the table, or leave it alone, against the wish of who set it",
        "pass execute: true or execute: false",
    )
    raise BadInput([problem])
