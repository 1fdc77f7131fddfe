# `make demo` and `make test` are all that a newcomer needs: they make the environment first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test check fix eval bench fuzz scale faults columns docs clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 18

setup: $(READY)  ## make the environment in .venv (minutes, once)

$(READY): pyproject.toml infra/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"t2vz needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): several GB, some minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)   ## render manifests/demo.csv with the embedded model into demo-out/
	@$(BIN)/t2vz run manifests/demo.csv --out demo-out

test: $(READY)   ## all tests but the slow ones
	@$(BIN)/pytest -m "not slow and not gpu"

test-slow: $(READY)  ## the tests that take minutes
	@$(BIN)/pytest -m slow

check: $(READY)  ## lint, format, types, layer rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

fix: $(READY)    ## format, and mend what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

faults: $(READY)  ## hundreds of kills, 10,000 rows in one go: three quarters of an hour; ends in one JSON object
	@$(BIN)/python tests/benchmarks/faults.py

columns: $(READY)  ## rewrite what is made from the code: columns in manifests/README.md, commands in t2vz/README.md
	@$(BIN)/python -m t2vz.columns
	@$(BIN)/python -m t2vz.reference

docs: $(READY)   ## run the commands of the pages, and write what they print into them
	@$(BIN)/python tests/test_docs.py

eval: $(READY)   ## measure quality with the embedded model into eval-out/; the last line is one JSON object
	@$(BIN)/t2vz eval --out eval-out

bench: $(READY)  ## benchmarks (the last needs Chromium); each prints one JSON object as its last line
	@set -e; for file in engine gpu manifest results workers gallery; do echo "== $$file"; $(BIN)/python tests/benchmarks/$$file.py; done

fuzz: $(READY)   ## 2,000 damaged media files, 500 manifests, 200 models; minutes; ends in one JSON object
	@$(BIN)/python tests/fuzz/fuzz.py

scale: $(READY)  ## what orchestration costs with 100,000 rows: Prefect on PostgreSQL, half an hour; ends in one JSON object
	@$(BIN)/python tests/benchmarks/scale.py

clean:           ## remove what was made, the environment too
	rm -rf $(VENV) demo-out eval-out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
