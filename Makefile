# Two commands for a fresh clone: `make repro` runs the experiment, `make test` the tests.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3.11
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
UV := $(BIN)/uv

.PHONY: setup data repro test fast smoke nightly parity bench check audit format ui lock preflight clean

preflight:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 (Debian: apt install python3.11 python3.11-venv)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "$(PYTHON) is not Python 3.11: give another by PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "the venv module is missing: apt install python3.11-venv"; exit 2; }
	@command -v git >/dev/null || { echo "git not found: apt install git"; exit 2; }
	@[ -d $(VENV) ] || [ "$$(df -Pk . | awk 'NR==2 {print $$4}')" -gt 10000000 ] || { echo "less than 10 GB free here: the environment takes 7 GB"; exit 2; }

# the environment, from the lock; made again when the lock changes. Compiled at once (33 s on 2 cores): where
# Python may not write bytecode, every stage would compile its imports anew (scoring began after 18 s, not 7)
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(MAKE) --no-print-directory preflight
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	[ -x $(UV) ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	$(UV) pip sync --python $(BIN)/python --quiet --compile-bytecode requirements.lock
	$(UV) pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	touch $@

setup: $(VENV)/.ready

# inputs from the in-repo remote; instant when they are there
data: setup
	dvc pull --quiet --remote seed data.dvc

repro: data
	spo repro

# tests write names of every script, whatever the language of this account
test fast smoke nightly parity check: export LC_ALL := C.UTF-8

# a process for each core, a file at a time
test: data
	pytest -n auto

fast: setup
	pytest -n auto -m "not smoke and not services"

smoke: data
	pytest -m smoke

# rare things proved by many processes, real servers, a browser or minutes of work: before a release, and on a schedule
nightly: data
	pytest -n auto -m nightly

# this package beside the official algorithms and diffusers' pipeline; writes docs/benchmarks.md (5 minutes)
bench: data
	python -m benchmarks

check: setup
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	pytest -n auto -m "not smoke and not services"
	@$(MAKE) --no-print-directory audit

# known holes in the locked dependencies, where pip-audit can reach its data
audit: setup
	@mkdir -p .spo
	@$(UV) tool run --quiet pip-audit -r requirements.lock --disable-pip --require-hashes > .spo/audit.txt 2>&1; code=$$?; \
	unknown=$$(grep -c "could not be audited" .spo/audit.txt); \
	if [ $$code -ne 0 ] && grep -q "^Found .*vulnerabilit" .spo/audit.txt; then cat .spo/audit.txt; exit 1; \
	elif [ $$code -ne 0 ] || [ $$unknown -gt 0 ]; then \
	  echo "audit: $$unknown of $$(grep -c '^[a-z0-9].*==' requirements.lock) dependencies were not audited, pip-audit cannot reach its data; see .spo/audit.txt"; \
	else echo "audit: no known vulnerability"; fi

format: setup
	ruff format .
	ruff check --fix .

# MLflow's pages at 127.0.0.1, port 5000: one process, and none for jobs of language models, which nothing here has
ui: setup
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1 --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///mlflow.db

lock:
	$(UV) pip compile pyproject.toml --extra dev --generate-hashes --no-emit-index-url --no-header \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --upgrade -o requirements.lock

clean:
	rm -rf $(VENV) .spo outputs
