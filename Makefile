# `make demo` and `make test` set up what they need; `make help` lists the rest.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test setup lint types imports proto proto-check schemas schemas-check unit bench chaos clean

PYTHON ?=
DATA ?=
ARGS ?=
WORKERS ?= 2
CHAOS_MINUTES ?= 10
CHAOS_SEED ?=
export VIRTUAL_ENV := $(CURDIR)/.venv
BIN := .venv/bin
READY := .venv/.ready
PACKAGES := fedrt silo coordinator certs
# the modules of tests/bench that have a main; the others are parts of them
BENCHMARKS := $(patsubst tests/bench/%.py,%,$(shell grep -l '^def main\|^async def main' tests/bench/*.py))

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1|\2/p' Makefile | while IFS='|' read -r left right; \
	    do printf '%-20s %s\n' "$$left" "$$right"; done

demo: $(READY) ## the main job: a coordinator and three silos; DATA=digits for handwritten digits, ARGS=... for more
	@$(BIN)/fedrt-demo $(if $(DATA),--data $(DATA)) $(ARGS)

test: lint types imports proto-check schemas-check unit ## every check and every test; what CI runs

setup: $(READY) ## only the virtual environment .venv with everything in it; done again when pyproject.toml changes

$(READY): pyproject.toml scripts/setup.sh
	@PYTHON='$(PYTHON)' scripts/setup.sh
	@touch $@

lint: $(READY) ## style (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## types (mypy --strict)
	$(BIN)/mypy

imports: $(READY) ## which package may import which (import-linter)
	$(BIN)/lint-imports

proto: $(READY) ## write the code that is generated from proto/
	scripts/proto.sh

proto-check: $(READY) ## generated code is current; with npm also buf's lint and breaking-change rules
	scripts/proto.sh --check
	@scripts/buf.sh

schemas: $(READY) ## write docs/schemas from the configuration models
	$(BIN)/python scripts/export_schemas.py

schemas-check: $(READY) ## docs/schemas are current
	$(BIN)/python scripts/export_schemas.py --check

unit: $(READY) ## all tests, without the other checks; ARGS='-k name' for some
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(ARGS)

bench: $(READY) ## every benchmark of tests/bench, each printing JSON; BENCHMARKS=name for one
	@for name in $(BENCHMARKS); do echo "== $$name" >&2; $(BIN)/python -m "tests.bench.$$name" $(ARGS); done

chaos: $(READY) ## faults strike a federation of real processes, CHAOS_MINUTES=10 long; CHAOS_SEED=n to repeat a run
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --minutes $(CHAOS_MINUTES) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED)) $(ARGS)

clean: ## remove caches and what was generated, but not .venv: delete that to set up anew
	rm -rf .make .demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(PACKAGES) tests scripts -name __pycache__ -prune -exec rm -rf {} +
