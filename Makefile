# Set up, run and test. Everything lives in .venv; a second call starts in seconds.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -m1 '^GPU')
REQUIREMENTS := $(if $(GPU),-e .[dev],-r requirements/cpu.txt)
LANES := $(wildcard tests/unit tests/contract tests/distributed tests/integration $(if $(GPU),tests/gpu))

# The first interpreter that is Python 3.11; make PYTHON=/path/to/python3.11 names another.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)

# With it set, every process of a launch would compile torch anew: 15 s of CPU each.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install quickstart test chaos doctor clean

help:
	@echo "make quickstart   train InterFormer on synthetic data, on every GPU or else on 2 CPU ranks"
	@echo "make test         lint, then every test lane"
	@echo "make chaos        kill, freeze and damage real jobs, and compare how they end with an unbroken one"
	@echo "make doctor       check this machine and the install; prints what mends a fault"
	@echo "make install      only set up $(VENV) (the targets above do it too)"
	@echo "make clean        remove $(VENV) and caches; runs/ and prepared/ stay"

install: $(STAMP)

# PYTHON given to make names the interpreter to build .venv from; the launcher must run the one inside.
quickstart: $(STAMP)
	@PYTHON=$(PY) launchers/torchrun.sh --config configs/quickstart.yaml

test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@for lane in $(LANES); do echo "== $$lane"; \
		$(PY) -m pytest $$lane $$([ $$lane = tests/unit ] && echo "-n auto") || exit 1; done

chaos: $(STAMP)
	$(PY) -m tools.chaos

# Must also run on an install that is broken or missing.
doctor:
	@$(if $(wildcard $(PY)),$(PY),$(or $(PYTHON),python3)) -m tools.doctor

$(STAMP): pyproject.toml $(wildcard requirements/*.txt requirements/*/pyproject.toml) | $(VENV)/bin/pip
	@echo "Installing into $(VENV): pip install $(REQUIREMENTS) (once; about 80 s, longer on a slow line)"
	@$(PY) -m pip install -q --disable-pip-version-check --no-compile $(REQUIREMENTS)
	@touch $@

$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "This project needs Python 3.11, and neither python3.11, python3 nor python is one." >&2; \
		echo "Install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
