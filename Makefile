# `make demo` and `make test` do all the set-up themselves, once: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV ?= .venv
# `make test SLOW=1` runs the slow tests too; JOBS=1 runs the tests one after the other.
SLOW ?=
JOBS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := build/demo

# One thread a process: tests and Ray workers share the machine's cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo check test test-all format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## set up .venv with the tested versions

# torch goes first and by its version alone, so that a CPU wheel offered by your pip configuration is taken.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("ranksearch needs Python 3.11 or newer, found %s: make PYTHON=python3.11" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

demo: $(INSTALLED)  ## a search on the embedded data: front, export of the knee, evaluation
	@mkdir -p $(DEMO)
	@if $(BIN)/ranksearch trials demo >/dev/null 2>&1; then set -x; $(BIN)/ranksearch resume demo; \
	else set -x; $(BIN)/ranksearch search search_spaces/quickstart.yaml --study demo; fi
	$(BIN)/ranksearch front demo --html $(DEMO)/front.html
	$(BIN)/ranksearch export demo --knee -o $(DEMO)/rank_map.json --save-weights $(DEMO)/compressed.safetensors
	$(BIN)/ranksearch evaluate $(DEMO)/rank_map.json
	@echo "The front is $(DEMO)/front.html, its knee $(DEMO)/rank_map.json. To choose another point in the browser:"
	@echo "  $(BIN)/ranksearch dashboard demo"
	@echo "Every trial in MLflow: $(BIN)/ranksearch ui demo"

check: $(INSTALLED)  ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## all checks and tests but the slow ones; SLOW=1 runs those too
	$(BIN)/pytest -n $(JOBS) --dist loadgroup $(if $(SLOW),,-m "not slow") </dev/null

test-all:  ## all checks and all tests
	$(MAKE) test SLOW=1

format: $(INSTALLED)  ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
