# Every target sets itself up: `make demo` and `make test` work in a fresh clone.
#   make demo PYTHON=python3.12 VENV=/somewhere/else

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# OpenMP threads that spin while they wait slow every other process of a small machine down, up to ten times.
export OMP_WAIT_POLICY ?= passive
# Ray reports usage statistics at each start unless told otherwise.
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: demo test test-slow check docs bench lock clean

demo: $(READY)
	$(BIN)/python jobs/pipeline.py configs/demo.yaml

test: $(READY)
	$(BIN)/python -m pytest

# Can be stopped: the next one goes on with what has not passed on the same code. AFRESH=1 runs all of it.
test-slow: $(READY)
	$(BIN)/python -m pytest -vv -m "slow and not gpu" --go-on $(if $(AFRESH),--cache-clear)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Broken links fail it. Open site/index.html; for the search, too: python -m http.server -d site
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean --quiet

bench: $(READY)
	$(BIN)/python benchmarks/run.py

# The file appears last, so an installation that was cut off is made again; a changed pin or dependency, too.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version 2>&1) was found; run make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

# What is installed now becomes the pins. To raise them, empty constraints.txt, delete the environment, run this.
lock: $(READY)
	$(BIN)/python -m pip freeze --disable-pip-version-check --exclude-editable > constraints.txt
	@touch $(READY)

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis site
	find revision_ray jobs tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
