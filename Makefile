# `make demo` and `make test` set everything up themselves; they need Python 3.10 to 3.13 and nothing else.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python

.PHONY: demo test test-min test-peft supported-models attack api release-check lint clean

demo: $(VENV)/ready
	$(PY) examples/sentiment.py

# one thread for each of the processes: more would wait for one another
test test-min: export OMP_NUM_THREADS ?= 1

test: $(VENV)/ready
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

# the same tests on the lowest versions that setup.cfg admits
test-min: .venv-min/ready
	.venv-min/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# PEFT's own tests, unmodified, against EAS
test-peft: $(VENV)/ready
	$(PY) tests/peft_suite/run.py $(ARGS)

# every family, on tiny random models: writes docs/supported-models.md
supported-models: $(VENV)/ready
	$(PY) tests/matrix.py

# everything that is tried to break the package: writes docs/robustness.md
attack: $(VENV)/ready
	$(PY) tests/attack.py

# the public API's docstrings: writes docs/api.md
api: $(VENV)/ready
	$(PY) docs/make_api.py

# the wheel, in an empty virtual environment: trains, merges, saves and loads there
release-check: $(VENV)/ready
	rm -rf build dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*
	$(PY) tests/release/check.py dist

lint: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(VENV)/ready: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv-min/ready: setup.cfg constraints-min.txt
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install -q -c constraints-min.txt torch
	.venv-min/bin/python -m pip install -q -c constraints-min.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-min .cache outputs runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
