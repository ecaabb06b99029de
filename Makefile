# make demo : set up, then train a draft from nothing and measure it     make test : set up, then run every test
PYTHON ?= python3
VENV   ?= .venv
DISTRIBUTIONS := core specforge_eagle3 specforge_dflash specforge_domino \
	plugins/hf-target plugins/mooncake-store plugins/redis-channel
STAMP  := $(VENV)/.set-up
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup services demo compare test chaos fuzz prompts load test-server lint bench clean

help:
	@echo "make setup   everything of this repository, editable, into $(VENV)"
	@echo "make demo    set up, train a small target and an EAGLE-3 draft, bench and report (about 8 minutes)"
	@echo "make compare train and bench every strategy on the demo target, side by side"
	@echo "make test    set up, start the servers the tests need, run every test"
	@echo "make chaos   200 faults, seeded, against runs over files and over Mooncake and Redis (SEED=7 FAULTS=200)"
	@echo "make fuzz    files of every kind, changed in every way, read for SECONDS=120 each (SEED=7)"
	@echo "make prompts 10,000 random conversations through chat templates of every kind (SEED=7 TALKS=10000)"
	@echo "make load    20,000 samples through 4 capture processes, with backpressure on"
	@echo "make test-server   serve exports in vLLM on CPU (installs it, 4 GB, into an environment of its own; 8 minutes)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   steps against a peer (installed into an environment of its own), stores and channels"

setup: $(STAMP)

# Repeated only when what it installs from has changed.
$(STAMP): Makefile VERSION constraints.txt requirements-dev.txt $(DISTRIBUTIONS:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed, $(PYTHON) is " + sys.version.split()[0] + "; say make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation \
		-e 'core[report,datasets,testing]' -e 'plugins/mooncake-store[cpu]' $(DISTRIBUTIONS:%=-e %)
	@touch $@

# What the tests' real servers need besides Python packages: Redis, the libraries Mooncake is linked with, and a clock
# that can be made to jump. Installed where this is Debian or Ubuntu and we may; else said.
SYSTEM_PACKAGES := redis-server libibverbs1 libnuma1 libcurl4 faketime
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)
services: $(VENV)/.services
$(VENV)/.services: Makefile | $(STAMP)
	@dpkg -s $(SYSTEM_PACKAGES) >/dev/null 2>&1 || { \
		echo "installing $(SYSTEM_PACKAGES)"; \
		$(SUDO) apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $(SYSTEM_PACKAGES) >/dev/null; \
	} || { echo "the tests start real servers: install $(SYSTEM_PACKAGES) (or what your system calls them)"; exit 1; }
	@touch $@

demo: setup
	$(BIN)/specforge demo eagle3

compare: setup
	$(BIN)/python benchmarks/compare_strategies.py

test: setup services
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Long versions of what the suite does in small: faults at random moments, and 20,000 samples.
SEED   ?= 7
FAULTS ?= 200
chaos: setup services
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/fault/chaos/chaos.py --faults $(FAULTS) --seed $(SEED)

SECONDS ?= 120
fuzz: setup
	$(BIN)/python -m pytest tests/fuzz -n 2 --timeout 0 --fuzz-seconds $(SECONDS) --fuzz-seed $(SEED)

TALKS ?= 10000
prompts: setup
	$(BIN)/python -m pytest tests/prompts -n 2 --timeout 0 --talks $(TALKS) --talks-seed $(SEED)

load: setup services
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/load_run.py

# vLLM pins versions that differ from ours, so it has an environment of its own.
VLLM := .venvs/vllm
$(VLLM)/.set-up: tests/server/vllm-requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

test-server: setup $(VLLM)/.set-up
	SPECFORGE_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -m server -s tests/server

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The peer pins versions that differ from ours, so it has an environment of its own.
PEER := .venvs/peer
$(PEER)/.set-up: benchmarks/peer-requirements.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --no-deps speculators==0.9.0 torch==2.13.0
	$(PEER)/bin/python -m pip install --quiet -r benchmarks/peer-requirements.txt
	@touch $@

bench: setup services $(PEER)/.set-up
	$(BIN)/python benchmarks/cli_startup.py
	$(BIN)/python benchmarks/eagle3_step.py --peer-python $(PEER)/bin/python
	$(BIN)/python benchmarks/dflash_step.py --peer-python $(PEER)/bin/python
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/wires.py

clean:
	rm -rf $(VENV) dist build
