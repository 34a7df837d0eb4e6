# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv
	$(BIN)/fitv2 demo --out demo

# OMP_NUM_THREADS=1: two OpenMP teams on one busy machine run many times slower than one thread each.
test: .venv lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	OMP_NUM_THREADS=1 $(BIN)/python tools/check_docs.py

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: .venv
	$(BIN)/python benchmarks/packed_vs_padded.py

.venv: .venv/installed

# The stamp is written last, so an interrupted installation is done again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fitv2 needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	# Without torchvision, which it imports for its built-in datasets alone: tests compare with its formulas.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps torch-fidelity
	# Beside the environment, for one test: where torchao is installed, diffusers imports it each time.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --target .venv/torchao torchao
	touch $@

clean:
	rm -rf .venv demo .mypy_cache .ruff_cache .pytest_cache
