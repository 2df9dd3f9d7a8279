# One command each; every one of them sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1
CORES ?= all
HEAVY ?= heavy
BENCHMARKS ?= steps operators training stores extraction evaluation latents rates
# Tests start many processes of their own: without cached bytecode each compiles the package. Threads that wait must not
# spin: two workers and their jobs share two cores.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=30
QUIET := --disable-pip-version-check -q --progress-bar off
PIP := $(BIN)/python -m pip install $(QUIET)

.PHONY: setup demo full rehearse test test-heavy test-all versions check docs tutorial site bench bench-gpu torture truth

setup: .venv/ready

# The lock says what the environment holds; it is made again when the lock changes.
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: expected Python 3.11 or newer, found $$($(PYTHON) --version). Set PYTHON=python3.11 or later." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	# torch first, in the build that pip is set to prefer (a CPU one, say), and with that build's own libraries.
	sed -n '/^torch==/,/[^\\]$$/p' requirements.lock > .venv/torch.lock
	$(BIN)/python -m pip download $(QUIET) --no-deps -d .venv/torch "$$(grep -o '^torch==[0-9.]*' .venv/torch.lock)"
	$(PIP) --require-hashes --no-deps --no-index --find-links .venv/torch -r .venv/torch.lock
	rm -r .venv/torch
	$(PIP) --require-hashes --no-deps -r requirements.lock
	$(PIP) "$$(grep -o '^torch==[0-9.]*' .venv/torch.lock)"
	$(PIP) --no-deps -e .
	@touch $@

demo: setup
	saeflow validate
	snakemake --cores $(CORES) all
	@echo "The report: $(CURDIR)/results/report.html"

# The demo with three seeds of every SAE: error bars on every point.
full: setup
	snakemake --cores $(CORES) all --config 'seeds=[0,1,2]'
	@echo "The report: $(CURDIR)/results/report.html"

# Every preset's whole workflow, scaled down to this machine: all entries, tables and figures, no GPU and no hub.
rehearse: setup
	saeflow rehearse presets/*.yaml

check: setup
	ruff format --check .
	ruff check .
	mypy
	snakefmt --check Snakefile workflow
	snakemake --lint

# The pages of docs/ that are made from the code.
docs: setup
	python docs/tree.py
	saeflow parameters --markdown > docs/parameters.md
	python -m saeflow.tables docs/tables.md

# The outputs of docs/tutorial.ipynb, from a run of its own.
tutorial: setup
	python -m docs.notebook runs/tutorial

# The site of the documentation, site/index.html, in an environment of its own. A broken link is an error.
# (--quiet would drop the warnings that --strict counts.)
site: .venv-site/ready
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --strict

.venv-site/ready: docs/requirements.txt
	$(PYTHON) -m venv .venv-site
	.venv-site/bin/python -m pip install $(QUIET) --require-hashes --no-deps -r docs/requirements.txt
	@touch $@

# A file's tests run in one process: what its fixtures make, a whole workflow in some, is made once.
test: check
	$(PYTEST) -m "not heavy"

# What takes minutes by nature: SLURM, conda, other libraries' environments, downloads, DVC experiments, faults, a
# rehearsal. SLURM's tests wait most of their time, for its clocks: a third worker has them.
test-heavy: setup
	$(PYTEST) -n 3 -m "$(HEAVY)"

test-all: test test-heavy

# A short test with the newest releases that pip resolves, and with the oldest that pyproject.toml allows.
versions:
	PYTHON=$(PYTHON) .ci/versions

# Against other libraries, in environments of their own, and against the machine's limits; about half an hour.
bench: setup
	snakemake --cores $(CORES) results/stores/smollm2/train/provenance.json
	for name in $(BENCHMARKS); do python benchmarks/$$name.py || exit 1; done

# All that a GPU decides, in about four minutes, on a bare machine with torch, Triton and a GPU. WHEELS=FOLDER holds
# wheels of what that machine lacks, and of peers that are to be measured too.
bench-gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS))

# Kills, rotten files, full disks, wrong clocks, broken hubs, and 20 000 changed inputs; about an hour.
torture: setup
	OMP_NUM_THREADS=1 python benchmarks/torture.py

# Every variant on data whose truth is known, in as many processes as there are cores.
truth: setup
	python benchmarks/truth.py
