# make quickstart [FRESH=1]  data, tokenizers, model, LoRA, images, report in runs/quickstart/
# make check                 lint, types and fast tests: under two minutes on two cores
# make test                  lint, types and all tests
PYTHON ?= python3
BIN := .venv/bin

# On busy cores, torch's threads would otherwise spin in wait for one another: up to 30 times slower.
export OMP_WAIT_POLICY ?= PASSIVE

# Test files share the cores; a test starts with one thread.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: quickstart check test lint clean

quickstart: .venv/quickstart.installed
	$(BIN)/python recipes/quickstart.py $(if $(FRESH),--fresh)

check: lint
	$(PYTEST) -m "not process"

test: lint
	$(PYTEST)

lint: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs data

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
