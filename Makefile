# Each target sets up .venv when it is missing or older than pyproject.toml or constraints.txt.
# `make install PYTHON=python3.12` chooses another interpreter for a new .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGE := $(VENV)/.dreamloom-package
STAMP := $(VENV)/.dreamloom-installed

.PHONY: help install demo docs test test-web test-clients check format clean
.DEFAULT_GOAL := help

help:
	@echo "make install   set up $(VENV) with DreamLoom and its development tools"
	@echo "make demo      the whole journey on the embedded model, into runs/demo; the package alone"
	@echo "make test      run the tests (ARGS='-k merge --slow' passes options to pytest)"
	@echo "make test-web  the studio, driven by a browser (Debian's chromium); half an hour or more"
	@echo "make test-clients COMFYUI=/path SD_SCRIPTS=/path LYCORIS=/path ONETRAINER=/path"
	@echo "               other programs' own loaders and writers, from your checkouts, against ours"
	@echo "make docs      the documentation site, into build/site; opens without a server"
	@echo "make check     formatting, lint and types"
	@echo "make format    let ruff format and fix the code"
	@echo "make clean     remove $(VENV) and caches; runs/ stays"

install: $(STAMP)

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { \
		echo "DreamLoom needs Python 3.11 or newer, and there is no '$(PYTHON)' here." >&2; \
		echo "Install Python, or name it: make install PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "DreamLoom needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name a newer one: make install PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "'$(PYTHON)' cannot make virtual environments." >&2; \
		echo "On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The interpreter is an order-only prerequisite: its date says nothing about what is installed.
# Torch goes first and alone, so that nothing else chooses a build of it.
$(PACKAGE): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -e . -c constraints.txt
	@touch $@

# What tests and checks need comes on top of the package.
$(STAMP): $(PACKAGE)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev,heic]' -c constraints.txt
	@touch $@

demo: $(PACKAGE)
	$(BIN)/dreamloom demo --out runs/demo
	@echo "The command is $(BIN)/dreamloom; after 'source $(BIN)/activate' it is dreamloom."

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

# The browser is the system's own: none is fetched. Without one these tests are skipped, and say so.
test-web: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[web]' -c constraints.txt
	$(BIN)/python -m pytest tests/web tests/test_report_web.py tests/test_docs_site.py --web -rs $(ARGS)

# Nothing is fetched: programs that are not named here are skipped.
test-clients: export COMFYUI := $(COMFYUI)
test-clients: export SD_SCRIPTS := $(SD_SCRIPTS)
test-clients: export LYCORIS := $(LYCORIS)
test-clients: export ONETRAINER := $(ONETRAINER)
test-clients: $(STAMP)
	$(BIN)/python -m pytest tests/clients --clients -rs $(ARGS)

# Warnings are errors: strict stands in mkdocs.yml.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(BIN)/python -m mkdocs build
	@echo "Open build/site/index.html."

check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
