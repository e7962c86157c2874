# The README's commands, each from a bare clone with Python 3.11 or newer:
#   make repro   the main job on the embedded default: rollout, train, evaluate, report
#   make test    the default tests
#   make lint    ruff, mypy, import-linter
#   make test-rewards   our rewards against the official packages, which need an environment of their own

PYTHON ?= python3
VENV ?= .venv
REWARDS_VENV ?= .venv-rewards
REWARDS_PYTHON := $(abspath $(REWARDS_VENV))/bin/python
BIN := $(abspath $(VENV))/bin
RUN := PATH="$(BIN):$$PATH"
PACKAGES := pipeline schemas stages trainer
OLDER_CORE := $(addprefix tests/pipeline/,rewards/test_rewards.py rewards/test_open.py rewards/test_preprocess.py \
	rewards/test_aesthetic.py families/test_flux.py families/test_sd3.py weights/test_lora.py) \
	tests/stages/export/test_export.py tests/stages/rollout/test_golden.py

.PHONY: repro test test-rewards lint install clean

install: $(VENV)/.installed

# torch is pinned by constraints.txt in the same command: asked for later, it would be replaced.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

repro: install
	$(RUN) dvc repro
	@$(RUN) rats stage report --verdicts
	@echo "report: $(abspath reports/report.html)"

# two processes; the long files are not kept for the end
test: install
	$(RUN) python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# the packages' own numbers, then the core on the transformers and diffusers that they pin
test-rewards: $(REWARDS_VENV)/.installed
	$(REWARDS_PYTHON) -m pytest tests/rewards
	$(REWARDS_PYTHON) -m pytest -p tests.support.torchvision_guard -o addopts= -W default -m "not slow and not gpu" $(OLDER_CORE)

$(REWARDS_VENV)/.installed: pyproject.toml constraints-rewards.txt
	$(PYTHON) -m venv $(REWARDS_VENV)
	$(REWARDS_PYTHON) -m pip install --quiet -c constraints-rewards.txt -e '.[rewards]'
	$(REWARDS_PYTHON) -m pip check
	touch $@

lint: install build/typing/rats
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy $(foreach package,$(PACKAGES),-p rats.$(package))
	PYTHONPATH=build/typing PATH="$(BIN):$$PATH" lint-imports

build/typing/rats:
	mkdir -p $@
	for package in $(PACKAGES); do ln -sfn ../../../$$package $@/$$package; done

clean:
	rm -rf $(VENV) $(REWARDS_VENV) build
