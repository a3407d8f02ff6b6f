# Everything from a fresh clone, on a machine that has Python 3.11 or 3.12 and make. `make` alone lists the targets.

EXTRAS ?= dev,train,quant,openclip,serve,eval,harness,analysis
WORKERS ?= 2
ARGS ?=

VENV := .venv
CORE := .venv-core
LOWEST := .peft-lowest
UPSTREAM := .venv-upstream
LMMS := .lmms
WHEEL := .venv-wheel
BIN := $(VENV)/bin
UV := $(BIN)/uv
PINNED := --constraint constraints.txt --build-constraint constraints.txt
OFFLINE := HF_HUB_OFFLINE=1
# One thread per test process: the tiny models are too small to gain from more, and two workers share two cores.
# Bytecode is written even where the machine says otherwise: without it every process of a test compiles torch anew.
TEST_ENV := $(OFFLINE) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

# A name on PATH may be a shim of a version that is not installed, so each candidate is run.
VERSION_CHECK := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for name in python3.11 python3.12 python3 python; do \
	"$$name" -c '$(VERSION_CHECK)' >/dev/null 2>&1 && { echo "$$name"; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-core test-peft test-lmms test-wheel test-upstream lint types format check constraints clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## Install the package, its extras and the tools into .venv

demo: install ## Train, evaluate and reload a tiny model on the CPU; writes playground/out
	$(OFFLINE) $(BIN)/python -m playground.demo $(ARGS)

# A selection leaves the lowest PEFT out.
test: install test-core $(LMMS)/.installed $(if $(ARGS),,test-peft) ## Run all tests (ARGS="tests/data -x" selects)
	PYTHONPATH=$(CURDIR)/$(LMMS) $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m "not network" $(ARGS)

test-core: install $(CORE)/.installed ## Import every module with the core dependencies only
	$(OFFLINE) $(CORE)/bin/python -P tests/import_everything.py

# What pip calls the installed version; a folder in front of the others on the path hides theirs.
PEFT_VERSION := import importlib.metadata as m; print(m.version("peft"))

test-peft: install $(LOWEST)/.installed ## Test the PEFT method on the lowest PEFT that pyproject.toml admits
	@tested=$$($(BIN)/python -c '$(PEFT_VERSION)'); \
	lowest=$$(PYTHONPATH=$(LOWEST) $(BIN)/python -c '$(PEFT_VERSION)'); \
	if [ "$$lowest" = "$$tested" ]; then \
		echo "PEFT $$tested is the lowest version that pyproject.toml admits; the other tests run on it"; \
	else \
		echo "PEFT $$lowest, the lowest that pyproject.toml admits; the other tests run on $$tested"; \
		PYTHONPATH=$(LOWEST) $(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) tests/hydralora/tuner; \
	fi

test-lmms: install $(LMMS)/.installed ## Test our model in lmms-eval itself
	PYTHONPATH=$(CURDIR)/$(LMMS) $(TEST_ENV) $(BIN)/python -m pytest -q tests/eval/test_lmms.py $(ARGS)

test-wheel: install ## Build the wheel, install it in an empty environment and use it outside the repository
	$(TEST_ENV) $(BIN)/python -m tests.wheel --environment $(WHEEL)

# Upstream asks for Python 3.10; its pins have wheels for 3.8 to 3.11.
UPSTREAM_PYTHON ?= $(shell for name in python3.10 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.10*/bin/python python3.11; do \
	"$$name" -c '' >/dev/null 2>&1 && { echo "$$name"; break; }; done)
UPSTREAM_PINS ?= tests/moe_patch/upstream.txt

UPSTREAM_READY = $(UPSTREAM)/.installed-$(notdir $(UPSTREAM_PINS))

test-upstream: install $(UPSTREAM_READY) ## Test moe_patch on a clone of haotian-liu/LLaVA (LLAVA_UPSTREAM_DIR=...)
	@test -d "$(LLAVA_UPSTREAM_DIR)" || { echo "say where upstream is: make $@ LLAVA_UPSTREAM_DIR=/path/to/LLaVA"; exit 1; }
	LLAVA_UPSTREAM_DIR="$(abspath $(LLAVA_UPSTREAM_DIR))" LLAVA_UPSTREAM_PYTHON="$(abspath $(UPSTREAM)/bin/python)" \
		$(TEST_ENV) $(BIN)/python -m pytest $(ARGS) tests/moe_patch/test_upstream.py

lint: install types ## Check style and formatting with ruff, then the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## Check the types of the layers, the configurations and the extension protocol
	$(BIN)/mypy

format: install ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## lint, types and test

constraints: install ## Write constraints.txt anew from the newest versions that pyproject.toml allows
	$(UV) venv --quiet --clear --seed --python $(BIN)/python .venv-constraints
	$(UV) pip install --quiet --python .venv-constraints ".[dev,train,quant,openclip,serve,eval,harness,analysis]"
	grep '^#' constraints.txt > .venv-constraints/pins
	$(UV) pip freeze --python .venv-constraints | grep -vE '^(llava-extensions|pip)\b' >> .venv-constraints/pins
	mv .venv-constraints/pins constraints.txt
	rm -rf .venv-constraints

clean: ## Remove the environments and everything that tools have cached
	rm -rf $(VENV) $(CORE) $(LOWEST) $(UPSTREAM) $(LMMS) $(WHEEL) .venv-constraints build *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(VERSION_CHECK)' 2>/dev/null || { \
		echo "llava-extensions needs Python 3.11 or 3.12; '$(or $(PYTHON),python3)' is: $$($(or $(PYTHON),python3) --version 2>&1)."; \
		echo "Install one of them, or say where it is: make install PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot create environments. Install its venv module; on Debian: apt-get install python3-venv"; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(UV) pip install --python $(VENV) $(PINNED) --editable ".[$(EXTRAS)]"
	@touch $@

$(CORE)/.installed: $(VENV)/.installed
	$(UV) venv --quiet --clear --python $(BIN)/python $(CORE)
	$(UV) pip install --quiet --python $(CORE) $(PINNED) --editable .
	@touch $@

$(LOWEST)/.installed: $(VENV)/.installed tests/requirement.py
	rm -rf $(LOWEST)
	$(UV) pip install --quiet --python $(VENV) --target $(LOWEST) --no-deps --resolution lowest \
		"$$($(BIN)/python tests/requirement.py peft)"
	@touch $@

# A folder beside the environment: all that lmms-eval asks for would change versions that are tested here.
$(LMMS)/.installed: $(VENV)/.installed tests/eval/lmms.txt
	rm -rf $(LMMS)
	$(UV) pip install --quiet --python $(VENV) --target $(LMMS) --no-deps --requirement tests/eval/lmms.txt
	@touch $@

$(UPSTREAM_READY): $(VENV)/.installed $(UPSTREAM_PINS)
	$(UV) venv --quiet --clear --python "$(UPSTREAM_PYTHON)" $(UPSTREAM)
	grep -v '^deepspeed' $(UPSTREAM_PINS) > $(UPSTREAM)/first.txt
	$(UV) pip install --quiet --python $(UPSTREAM) --requirement $(UPSTREAM)/first.txt
	DS_BUILD_OPS=0 $(UV) pip install --quiet --python $(UPSTREAM) --no-build-isolation --requirement $(UPSTREAM_PINS)
	@touch $@
