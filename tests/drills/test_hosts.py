"""Two runners on two hosts: network namespaces with names and addresses of their own, against one server over TCP."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from runbook_lib.core.registry import NOTEBOOKS_ENV
from runbook_lib.runner import manifest
from tests import servers, small_notebooks, toy
from tests.conftest import DSN_ENV, write_params
from tests.drills import kit, real_runs

pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="namespaces are made by root, with ip"),
]

FIRST = "00_preflight"
# Addresses that are of no network: those of tests between two networks.
NETWORK = "198.18"
PORT = 54329


@contextmanager
def host(number: int) -> Iterator[list[str]]:
    """What stands before a command to run it on a host of its own; its address ends with .2, the server's with .1."""
    name = f"rb{os.getpid() % 10000}-{number}"
    with ExitStack() as undo:
        for made, taken_away in (
            (f"netns add {name}", f"netns del {name}"),
            (f"link add {name} type veth peer name eth0 netns {name}", ""),
            (f"address add {NETWORK}.{number}.1/24 dev {name}", ""),
            (f"link set {name} up", ""),
            (f"-n {name} address add {NETWORK}.{number}.2/24 dev eth0", ""),
            (f"-n {name} link set eth0 up", ""),
            # Kernels talk to their runner through it.
            (f"-n {name} link set lo up", ""),
        ):
            done = subprocess.run(["ip", *made.split()], capture_output=True, text=True)
            if done.returncode and made.startswith("netns"):
                pytest.skip("network namespaces cannot be made here")
            assert not done.returncode, f"ip {made}: {done.stderr}"
            if taken_away:
                undo.callback(subprocess.run, ["ip", *taken_away.split()], check=True)
        named = f'hostname host-{number} && exec "$@"'
        yield ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, "sh"]


@pytest.mark.attack
@pytest.mark.skipif(not kit.FULL, reason="four runs in a row, for the full drill")
def test_of_two_runners_on_two_hosts_one_runs_and_the_other_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one folder of records. What was killed on the first is settled there, whoever runs in between."""
    body = "import time\nfrom pathlib import Path\nwhile Path('go-slow').exists(): time.sleep(0.1)"
    slow = tmp_path / "go-slow"
    slow.touch()
    notebooks = small_notebooks.write(tmp_path / "notebooks", **{f"p{FIRST}": body.replace("go-slow", str(slow))})
    params_file = write_params(tmp_path)
    monkeypatch.setenv(NOTEBOOKS_ENV, str(notebooks))
    monkeypatch.setenv("PYTHONPATH", str(kit.ROOT))
    command = [*real_runs.COMMAND, "run", str(params_file), "--execute", "--from", FIRST, "--to", FIRST]

    def begins(on: list[str], dsn: str) -> subprocess.Popen[str]:
        environment = {**os.environ, DSN_ENV: dsn}
        return subprocess.Popen([*on, *command], env=environment, stderr=subprocess.PIPE, text=True)

    with served() as server, host(1) as one, host(2) as two:
        dsn_of = {n: make_conninfo(server, host=f"{NETWORK}.{n}.1", port=PORT) for n in (1, 2)}
        monkeypatch.setenv(DSN_ENV, server)
        with kit.opened(params_file):
            pass  # There is a ledger, in which the first run can note that it began.
        first = begins(one, dsn_of[1])
        try:
            folder = kit.wait_for(lambda: at_work(tmp_path, server) or first.poll(), "the first run's claim")
            assert isinstance(folder, Path), first.communicate()[1]
            second = begins(two, dsn_of[2])
            said = second.communicate(timeout=kit.LONGEST_STEP_S)[1]
            assert second.returncode == 2 and f"runbook-runner {folder.name}" in said
            assert f", from {NETWORK}.1.2" in said
        finally:
            first.send_signal(signal.SIGKILL)
            first.communicate()
        assert (manifest.read(folder).host, manifest.read(folder).status) == ("host-1", "running")
        slow.unlink()
        for on, n, status in ((two, 2, "running"), (one, 1, "interrupted")):
            again = begins(on, dsn_of[n])
            said = again.communicate(timeout=kit.LONGEST_STEP_S)[1]
            assert (again.returncode, manifest.read(folder).status) == (0, status), said


@contextmanager
def cut_off(number: int) -> Iterator[None]:
    """The host is cut off for the length of the block: nothing arrives, and nobody is told."""
    name = f"rb{os.getpid() % 10000}-{number}"
    subprocess.run(["ip", "link", "set", name, "down"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "set", name, "up"], check=True)


def test_of_two_hosts_that_help_with_a_backfill_one_is_cut_off_and_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their ranges are taken over; back again, they do no harm."""
    monkeypatch.setenv("PYTHONPATH", str(kit.ROOT))
    with served() as server, host(1) as one, host(2) as two, ExitStack() as ended:
        monkeypatch.setenv(DSN_ENV, server)
        with psycopg.connect(server, autocommit=True) as connection:
            # Four rows to a page, so that there are ranges for all.
            connection.execute("ALTER TABLE articles ALTER body SET STORAGE PLAIN")
            connection.execute("""
                INSERT INTO articles (title, body)
                SELECT title, body FROM articles, generate_series(1, 9) WHERE title IS NOT NULL
            """)
            connection.execute("UPDATE articles SET body = repeat(body || ' ', 60) WHERE title IS NOT NULL")
            connection.execute("VACUUM FULL articles")
        slow = {"lease_s": 2, "pause_between_batches_ms": 400, "strategy": "page_interleaved"}
        params_file = kit.prepared(tmp_path, "load", backfill=slow)
        with kit.opened(params_file, "40_load_embeddings") as phase:
            phase.ledger.append("phase", {"verdict": "PASS"})
        with (
            kit.in_a_process("backfill", params_file) as main,
            psycopg.connect(server, autocommit=True) as connection,
        ):
            kit.wait_for(lambda: at_ranges(connection, 1), "the run's own worker")
            helpers = []
            for n, on in ((1, one), (2, two)):
                environment = {**os.environ, DSN_ENV: make_conninfo(server, host=f"{NETWORK}.{n}.1", port=PORT)}
                command = [*on, *real_runs.COMMAND, "help-out", str(params_file)]
                helpers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
                ended.callback(helpers[-1].communicate)
                ended.callback(helpers[-1].kill)
                kit.wait_for(lambda n=n: at_ranges(connection, n + 1), f"a range of host {n}")  # type: ignore[misc]
            with cut_off(1):
                helpers[1].send_signal(signal.SIGSTOP)
                connection.execute("UPDATE runbook.control SET pause_between_batches_ms = 0")
                # It may have ended since a host that was cut off held a row; then it is run again, as always.
                main.wait(kit.LONGEST_STEP_S)
                kit.go_on(params_file)
                taken_over = (
                    "SELECT max((body->>'windows_taken_over')::int) FROM runbook.entry WHERE kind = 'backfill'"
                )
                found = connection.execute(taken_over).fetchone()
                assert found is not None and found[0] >= 2
            helpers[1].send_signal(signal.SIGCONT)
            helpers[1].wait(kit.LONGEST_STEP_S)
        kit.finish(params_file)
        kit.nothing_is_lost(server, "of two hosts that helped, one cut off, one stopped and woken")


def at_ranges(connection: psycopg.Connection, workers: int) -> bool:
    """Are so many workers at a range each?"""
    held = "SELECT count(DISTINCT claimed_by) FROM runbook.articles_window WHERE done_at IS NULL AND claimed_by <> ''"
    there = connection.execute("SELECT to_regclass('runbook.articles_window') IS NOT NULL").fetchone()
    if there != (True,):
        return False
    row = connection.execute(held).fetchone()
    return row is not None and row[0] >= workers


@contextmanager
def served() -> Iterator[str]:
    """DSN, by socket, of a server that listens on every address of this machine; the toy table stands in it."""
    with tempfile.TemporaryDirectory(prefix="rb-", ignore_cleanup_errors=True) as folder:
        data = Path(folder) / "data"
        with servers.running("18.6 with 0.8.6", data, "-c listen_addresses='*'", PORT) as server:
            with (data / "pg_hba.conf").open("a") as hba:
                hba.write(f"host all all {NETWORK}.0.0/16 trust\n")
            with psycopg.connect(server, autocommit=True) as connection:
                connection.execute("SELECT pg_reload_conf()")
                toy.create_articles(connection)
            yield server


def at_work(folder: Path, server: str) -> Path | None:
    """The folder of the run whose notebook has the target."""
    with psycopg.connect(server) as connection:
        found = connection.execute(
            "SELECT split_part(application_name, ' ', 2) FROM pg_stat_activity WHERE application_name ~ %s",
            [rf"^runbook \S+ {FIRST}$"],
        ).fetchone()
    return folder / "runs" / found[0] if found else None
