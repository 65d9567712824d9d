# Two commands: `make demo` shows what faststeer does, `make test` proves it. Each sets up its own virtual environment first, and does nothing twice.

PYTHON ?= python3
# One version, so that every machine tests the same; 2.11 and later are supported.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo

.PHONY: demo test test-full lint format clean

demo: $(VENV)/.ready
	$(BIN)/faststeer demo --out $(OUT)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2

test-full: $(VENV)/.ready-dev
	FASTSTEER_TEST_PROFILE=full $(BIN)/python -m pytest -n 2 -m 'not gpu'

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
