"""The command ``runbook lab``: JupyterLab on working copies of the notebooks, and the record of what was done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from runbook_lib.cli.console import PARAMS, plain_errors, say, terminated_like_interrupted
from runbook_lib.runner import manifest as manifests
from runbook_lib.runner.manifest import SYMBOLS, Status


@click.command()
@PARAMS
@click.option("--no-browser", is_flag=True, help="Print the address, open no browser.")
@click.option("--port", type=int, help="Port of JupyterLab; the first free one from 8888 if not given.")
@click.option(
    "--ip", help="Address that JupyterLab listens on, such as 0.0.0.0 in a container; by default this machine only."
)
def lab(params_file: Path, no_browser: bool, port: int | None, ip: str | None) -> None:
    """Step through the notebooks in JupyterLab. It opens copies below runs/; Ctrl-C ends it and makes the record.

    \b
    Examples:
      runbook lab params/articles.yaml
      runbook lab params/articles.yaml --no-browser --port 8890    # for ssh -L
    """
    with plain_errors():
        open_lab(params_file, no_browser=no_browser, port=port, ip=ip)


def open_lab(params_file: Path, *, no_browser: bool = False, port: int | None = None, ip: str | None = None) -> None:
    """JupyterLab on the copies, in a group of processes of its own, so that Ctrl-C reaches it once and through us."""
    from runbook_lib.core.target import load_params
    from runbook_lib.runner import by_hand

    for settled in by_hand.settle(load_params(params_file)):
        say(f"{settled} had been killed; what it had carried out is recorded now")
    folder = by_hand.begin(params_file)
    say(f"JupyterLab on {folder / by_hand.START}.ipynb; Ctrl-C ends it and makes the record")
    with terminated_like_interrupted():
        command = _command(folder, no_browser, port, ip)
        lab = subprocess.Popen(command, start_new_session=True, env=by_hand.environment(folder))  # noqa: S603
        try:
            lab.wait()
        except KeyboardInterrupt:
            say("stopping JupyterLab")
        finally:
            if lab.poll() is None:
                lab.terminate()
                lab.wait()
    run = by_hand.finish(folder, load_params(params_file), manifests.read(folder))
    if run is None:
        say("nothing was carried out, so there is nothing to record")
    else:
        click.echo(f"{SYMBOLS[Status(run.status)]} {run.status}: {folder / 'index.html'}")


def _command(folder: Path, no_browser: bool, port: int | None, ip: str | None = None) -> list[str]:
    from runbook_lib.runner import by_hand

    root = by_hand.root(folder)
    start = (folder / f"{by_hand.START}.ipynb").relative_to(root)
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    command.append(f"--LabApp.default_url=/lab/tree/{start}")
    command += ["--no-browser"] if no_browser else []
    command += [f"--port={port}"] if port else []
    command += [f"--ip={ip}"] if ip else []
    return [*command, "--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else command
