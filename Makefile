# make demo       trains an edit on drawn pairs, edits unseen pictures, checks them (2 CPU cores, minutes)
# make test       the quick tests;  make test-all adds the slow ones
# make lint       ruff and mypy;  make clean removes what was built and cached
#
# The environment lives in .venv and is installed again when pyproject.toml or constraints.txt change.
# Another Python: make test PYTHON=python3.12. Another build of torch: preset PIP_INDEX_URL or PIP_EXTRA_INDEX_URL.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt
# Two workers with one thread each: faster than one worker with two threads for models this small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-all lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	$(BIN)/python -m pentimento.pocket.demo

test: $(VENV)/.test
	$(PYTEST) -m "not slow and not gpu and not weights"

test-all: $(VENV)/.test
	$(PYTEST) -m "not gpu and not weights"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pentimento benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install python3-venv (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# torch comes first and alone, so that a failing download is seen before anything else; setuptools builds the package.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch setuptools
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) --no-build-isolation --editable ".[test]"
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --no-build-isolation --editable ".[test,dev]"
	touch $@
