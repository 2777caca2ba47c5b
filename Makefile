# make quickstart [FRESH=1]  data, tokenizers, model, LoRA, images, report in runs/quickstart/
# make speedrun              how long two cores train to a fixed held-out quality: a row of the table in recipes/README.md
# make check                 lint, types and fast tests: under two minutes on two cores
# make test                  lint, types and all tests
# make gpu-check             what no CPU can prove, on one CUDA device: writes runs/gpu_check.md
# make docs                  the site, in site/; a link that leads nowhere fails
# make lock [UPGRADE=1]      write requirements/ from pyproject.toml; with UPGRADE, newest versions
# make audit                 known vulnerabilities of requirements/; asks PyPI's database
PYTHON ?= python3
BIN := .venv/bin

# On busy cores, torch's threads would otherwise spin in wait for one another: up to 30 times slower.
export OMP_WAIT_POLICY ?= PASSIVE

# Test files share the cores; a test starts with one thread.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# One lock for all platforms and for Python 3.11 and newer.
LOCK := $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --quiet \
	--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)

.PHONY: quickstart speedrun check test lint docs lock audit clean gpu-check

quickstart: .venv/quickstart.installed
	$(BIN)/python recipes/quickstart.py $(if $(FRESH),--fresh)

speedrun: .venv/quickstart.installed
	$(BIN)/python recipes/speedrun.py

check: lint
	$(PYTEST) -m "not process"

test: lint
	$(PYTEST)

lint: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-check: .venv/dev.installed
	$(BIN)/python eval/gpu_check.py

docs: .venv/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean

lock: .venv/dev.installed
	$(LOCK) --extra dev --output-file requirements/dev.txt
	$(LOCK) --extra quickstart --constraints requirements/dev.txt --output-file requirements/quickstart.txt

audit: .venv/dev.installed
	$(BIN)/uv tool run pip-audit --strict --disable-pip --requirement requirements/dev.txt

clean:
	rm -rf .venv runs data site

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The tools of the site are not locked: nothing that runs or tests the library needs them.
.venv/docs.installed: pyproject.toml | .venv/dev.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[docs]"
	touch $@

# setuptools, which builds the project, is in the lock too.
.venv/%.installed: pyproject.toml requirements/%.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements/$*.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
