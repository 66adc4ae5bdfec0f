# Everything a person runs by hand, and the same commands that CI runs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2

export OMP_NUM_THREADS ?= 1

.PHONY: help run test test-failed test-slow test-slow-failed test-lab test-lab-failed lab lab-down check lint types docs licences audit bench soak gpu clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/launch: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $(BIN)/launch

run: $(BIN)/launch   ## install, then train the digits example on 4 ranks
	$(BIN)/launch --procs 4 examples/digits.py

test: $(BIN)/launch  ## install, then the everyday test suite
	$(BIN)/python -m pytest -n $(JOBS) -m "not soak and not gpu and not lab and not slow"

test-failed: $(BIN)/launch ## those that failed last time, one at a time
	$(BIN)/python -m pytest --last-failed --last-failed-no-failures none -m "not soak and not gpu and not lab and not slow"

test-slow: $(BIN)/launch ## the few that take many seconds each: notebooks, logging servers, proofs of exact resume
	$(BIN)/python -m pytest -n $(JOBS) -o cache_dir=.pytest_cache/slow -m "slow and not soak"

test-slow-failed: $(BIN)/launch ## those of them that failed last time
	$(BIN)/python -m pytest -o cache_dir=.pytest_cache/slow --last-failed --last-failed-no-failures none -m "slow and not soak"

test-lab: $(BIN)/launch ## tests on a real Slurm of 3 nodes in namespaces (root; installs Debian's Slurm)
	tests/lab/install.sh
	$(BIN)/python -m pytest tests/lab -o cache_dir=.pytest_cache/lab -m "not soak"

test-lab-failed: $(BIN)/launch ## those of the lab's tests that failed last time
	$(BIN)/python -m pytest -o cache_dir=.pytest_cache/lab --last-failed --last-failed-no-failures none tests/lab -m "not soak"

lab: $(BIN)/launch ## a Slurm cluster of 3 nodes to play with (root); end it with make lab-down
	tests/lab/install.sh
	$(BIN)/python tests/lab/lab.py shell

lab-down:        ## end the cluster that make lab started
	$(BIN)/python tests/lab/lab.py down

check: lint types docs ## ruff, mypy strict, and the site without a warning

lint: $(BIN)/launch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/launch
	$(BIN)/mypy

docs: $(BIN)/launch  ## the site, into site/; nothing in it comes from the network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

licences: $(BIN)/launch ## the licences of everything that is installed with it
	$(BIN)/python .ci/licences.py all

audit: licences  ## licences, and known holes in what is installed (pip-audit asks pypi.org for each package)
	$(BIN)/python -m pip install --quiet 'pip-audit>=2.9'
	$(BIN)/pip-audit --skip-editable

bench: $(BIN)/launch ## benchmarks beside their peers, which are installed first; minutes
	$(BIN)/python -m pip install --quiet -e '.[peers]'
	$(BIN)/python benchmarks/launch_time.py --json benchmarks/results/launch_time.json
	$(BIN)/python benchmarks/step_overhead.py --json benchmarks/results/step_overhead.json
	for what in agents log_load; do \
	  $(BIN)/python benchmarks/$$what.py --json benchmarks/results/$$what.json || exit 1; done
	for what in save s3 plan; do \
	  $(BIN)/python benchmarks/checkpoint_$$what.py --json benchmarks/results/checkpoint_$$what.json || exit 1; done

soak: $(BIN)/launch  ## large counts of kills, faults and schedules; long
	$(BIN)/python -m pip install --quiet -e '.[third-party]'
	$(BIN)/python -m pytest -m soak

gpu: $(BIN)/launch   ## tests that need a GPU
	$(BIN)/python -m pytest -m gpu

clean:           ## remove what the build left (never your runs)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
