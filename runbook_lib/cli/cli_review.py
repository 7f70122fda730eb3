"""The commands of the second person: approve a phase, check that a record is whole, compare two runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from runbook_lib.cli import completion
from runbook_lib.cli.console import GATE_DID_NOT_PASS, PARAMS, echo_styled, plain_errors
from runbook_lib.core.registry import MIGRATE, OPERATE, UNDO_OPERATION, current, waits
from runbook_lib.runner.manifest import BAD_INPUT, SYMBOLS, Status


@click.command(epilog=f"Steps that can wait: {', '.join(filter(waits, (*MIGRATE, *OPERATE)))}.")
@PARAMS
@click.argument("phase", metavar="PHASE", shell_complete=completion.approvable)
@click.option("--reason", default="", help="Goes into the ledger and the record.")
@click.option("--yes", is_flag=True, help="Do not ask; for those who have read what is approved.")
def approve(params_file: Path, phase: str, reason: str, yes: bool) -> None:
    """Approve a phase that waits. Shows its plan and evidence, and asks.

    \b
    Run it as a different database user from the one that ran the phase. The
    approver needs, on the ledger's schema:
      GRANT USAGE ON SCHEMA runbook TO approver;
      GRANT SELECT ON runbook.entry TO approver;
      GRANT EXECUTE ON FUNCTION runbook.sign_off TO approver;
    They allow sign-offs and nothing else.
    """
    from runbook_lib.core import db
    from runbook_lib.core.target import load_params
    from runbook_lib.runner import selection, sign_off

    with plain_errors():
        phase = current(phase)
        selection.require_known(phase, (*MIGRATE, *OPERATE, *UNDO_OPERATION))
        params = load_params(params_file)
        with db.connect(params, "runbook approve") as connection:
            shown = sign_off.pending(connection, params, phase)
            click.echo(str(shown))
            if not yes:
                if not sys.stdin.isatty():
                    click.echo("no terminal to ask at: read the above, then rerun with --yes", err=True)
                    sys.exit(BAD_INPUT)
                if not click.confirm(f"\nApprove {phase}?", err=True):
                    click.echo("not approved", err=True)
                    sys.exit(GATE_DID_NOT_PASS)
            sign_off.approve(connection, params, shown, reason)
        click.echo(f"{SYMBOLS[Status.PASSED]} {phase} is approved; the next run carries it out")


@click.command()
@PARAMS
@click.argument("run_id", metavar="RUN_ID", shell_complete=completion.run_ids)
@click.option(
    "--head", default="", metavar="SHA256", help="The head of the ledger that a run printed, kept elsewhere."
)
def verify(params_file: Path, run_id: str, head: str) -> None:
    """Check that a record is unchanged. Checks the ledger's chain, and each file against it."""
    from runbook_lib.core.gates import Verdict
    from runbook_lib.core.target import load_params
    from runbook_lib.runner import verify as verification

    with plain_errors():
        gates = verification.check(load_params(params_file), run_id, head)
        click.echo(str(gates))
        if any(g.verdict is not Verdict.PASS for g in gates):
            sys.exit(GATE_DID_NOT_PASS)


@click.command()
@PARAMS
@click.argument("run_id", metavar="[RUN_ID]", required=False, shell_complete=completion.run_ids)
def record(params_file: Path, run_id: str | None) -> None:
    """Write the page of the whole migration. It is runs/TARGET/index.html, made from the ledger alone.

    With RUN_ID: write and seal a missing record from the ledger and notebooks, after a full disk or a killed
    JupyterLab.
    """
    from runbook_lib.core.target import load_params
    from runbook_lib.runner import by_hand, finishing
    from runbook_lib.runner import record as records

    with plain_errors():
        params = load_params(params_file)
        settled = by_hand.settle(params)
        if run_id is None:
            click.echo(os.path.normpath(records.write_derived(params, str(params_file.resolve()))))
            return
        page = params.record.runs_dir / run_id / "index.html"
        click.echo(os.path.normpath(page if run_id in settled else finishing.write_again(params_file, run_id)))


@click.command()
@click.argument("a", metavar="A", shell_complete=completion.run_ids)
@click.argument("b", metavar="B", shell_complete=completion.run_ids)
@click.option("--runs-dir", default="runs", type=click.Path(path_type=Path), help="Where run ids are looked up.")
@click.option("--notebooks/--no-notebooks", default=True, help="Compare the executed notebooks too.")
def diff(a: str, b: str, runs_dir: Path, notebooks: bool) -> None:
    """Compare two runs, by id or folder. Figures first, then the notebooks.

    \b
    Exit codes, like those of diff(1):
      0  the same figures, gates and statements; times and notebooks do not count
      1  they differ
      2  one of them cannot be read
    """
    from runbook_lib.runner import rundiff

    with plain_errors():
        found = rundiff.compare(rundiff.find(a, runs_dir), rundiff.find(b, runs_dir))
        click.echo(str(found))
        if notebooks:
            echo_styled(rundiff.notebooks(found, colour=sys.stdout.isatty()), sys.stdout)
        sys.exit(GATE_DID_NOT_PASS if found.differ else 0)
