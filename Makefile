# One command each; every one of them sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1
CORES ?= all

.PHONY: setup demo test check bench

setup: .venv/ready

# The lock says what the environment holds; it is made again when the lock changes.
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: expected Python 3.11 or newer, found $$($(PYTHON) --version). Set PYTHON=python3.11 or later." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q --progress-bar off -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	@touch $@

demo: setup
	saeflow validate
	snakemake --cores $(CORES) all
	@echo "The report: $(CURDIR)/results/report.html"

check: setup
	ruff format --check .
	ruff check .
	mypy
	snakefmt --check Snakefile workflow
	snakemake --lint

test: check
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadgroup

bench: setup
	for script in benchmarks/*.py; do python $$script || exit 1; done
