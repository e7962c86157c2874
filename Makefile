# The README's commands, each from a bare clone with Python 3.11 or newer:
#   make repro   the main job on the embedded default: rollout, train, evaluate, report
#   make test    the default tests
#   make lint    ruff, mypy, import-linter

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
RUN := PATH="$(BIN):$$PATH"
PACKAGES := pipeline schemas stages trainer

.PHONY: repro test lint install clean

install: $(VENV)/.installed

# torch is pinned by constraints.txt in the same command: asked for later, it would be replaced.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

repro: install
	$(RUN) dvc repro
	@echo "report: $(abspath reports/report.html)"

test: install
	$(RUN) python -m pytest

lint: install build/typing/rats
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy $(foreach package,$(PACKAGES),-p rats.$(package))
	PYTHONPATH=build/typing PATH="$(BIN):$$PATH" lint-imports

build/typing/rats:
	mkdir -p $@
	for package in $(PACKAGES); do ln -sfn ../../../$$package $@/$$package; done

clean:
	rm -rf $(VENV) build
