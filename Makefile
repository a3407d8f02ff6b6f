# Everything from a fresh clone, on a machine that has Python 3.11 or 3.12 and make. `make` alone lists the targets.

COMMA := ,
SPACE := $(subst ,, )
RUN_EXTRAS := train data quant openclip serve eval harness analysis trl
EXTRAS ?= dev,$(subst $(SPACE),$(COMMA),$(RUN_EXTRAS))
# TRL requires a later version of datasets than the lowest that is tested.
LOWEST_RUN_EXTRAS := $(filter-out trl,$(RUN_EXTRAS))
LOWEST_EXTRAS = $(subst $(SPACE),$(COMMA),$(filter-out trl,$(subst $(COMMA),$(SPACE),$(EXTRAS))))
WORKERS ?= 2
# Each process begins with a half and takes over from the other at the end, where the slow tests would keep one alone.
PARALLEL = -n $(WORKERS) --dist worksteal
ARGS ?=

VENV := .venv
CORE := .venv-core
ALONE := .venv-alone
LOWEST := .venv-lowest
SERVING := .venv-serving
LATEST := .venv-latest
UPSTREAM := .venv-upstream
LMMS := .lmms
WHEEL := .venv-wheel
BIN := $(VENV)/bin
UV := $(BIN)/uv
PINNED := --constraint constraints.txt --build-constraint constraints.txt
COMPILE = $(UV) pip compile --quiet --python $(BIN)/python --no-annotate --no-header
OFFLINE := HF_HUB_OFFLINE=1
# One thread per test process: the tiny models are too small to gain from more, and two workers share two cores.
# Bytecode is written even where the machine says otherwise: without it every process of a test compiles torch anew.
TEST_ENV := $(OFFLINE) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

# A name on PATH may be a shim of a version that is not installed, so each candidate is run.
VERSION_CHECK := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for name in python3.11 python3.12 python3 python; do \
	"$$name" -c '$(VERSION_CHECK)' >/dev/null 2>&1 && { echo "$$name"; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-core test-lowest test-serving-versions test-latest test-lmms \
	test-wheel test-upstream test-peft lint types format check constraints constraints-lowest clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-22s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## Install the package, its extras and the tools into .venv

demo: install ## Train, evaluate and reload a tiny model on the CPU; writes playground/out
	$(OFFLINE) $(BIN)/python -m playground.demo $(ARGS)

test: install test-core $(LMMS)/.installed ## Run all tests on constraints.txt (ARGS="tests/data -x" selects)
	PYTHONPATH=$(CURDIR)/$(LMMS) $(TEST_ENV) $(BIN)/python -m pytest $(PARALLEL) -m "not network" $(ARGS)

test-core: install $(CORE)/.installed $(ALONE)/.installed ## Import every module with the core dependencies only, and use hydralora with torch, transformers and peft
	$(OFFLINE) $(CORE)/bin/python -P tests/import_everything.py
	$(OFFLINE) $(ALONE)/bin/python -P tests/hydralora/alone.py

test-lowest: install $(LOWEST)/.installed ## Run the tests marked `versions` on the lowest versions admitted
	$(TEST_ENV) $(LOWEST)/bin/python -m pytest $(PARALLEL) -m "versions and not network" $(ARGS)

# Versions of transformers that serving engines ask for; everything else as in the lowest set.
SERVING_VERSIONS := 5.19 5.20
SERVING_TESTS := tests/llava/model/test_decoding.py tests/llava/model/test_generation.py tests/llava/model/test_backbones.py \
	tests/llava/convert/test_hf.py tests/dynamic/test_inference.py tests/mma/test_inference.py

test-serving-versions: install $(SERVING_VERSIONS:%=$(SERVING)-%/.installed) ## Test generation and conversion on transformers 5.19 and 5.20
	for version in $(SERVING_VERSIONS); do \
		$(TEST_ENV) $(SERVING)-$$version/bin/python -m pytest $(PARALLEL) -m "not network" $(ARGS) $(SERVING_TESTS) || exit 1; \
	done

test-latest: install ## Run all tests on what pip resolves today; never part of .ci/run
	$(UV) venv --quiet --clear --python $(BIN)/python $(LATEST)
	$(UV) pip install --quiet --python $(LATEST) --editable ".[$(EXTRAS)]"
	$(TEST_ENV) $(LATEST)/bin/python -m pytest $(PARALLEL) -m "not network" $(ARGS)

test-lmms: install $(LMMS)/.installed ## Test our model in lmms-eval itself
	PYTHONPATH=$(CURDIR)/$(LMMS) $(TEST_ENV) $(BIN)/python -m pytest -q tests/llava/eval/test_lmms.py $(ARGS)

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
		$(TEST_ENV) $(BIN)/python -m pytest $(ARGS) tests/moe_patch/test_upstream*.py

test-peft: install ## Run PEFT's own tests with HydraLoRA, from a checkout of huggingface/peft (PEFT_TESTS_DIR=...)
	@test -f "$(PEFT_TESTS_DIR)/tests/test_custom_models.py" || { echo "say where PEFT is: make $@ PEFT_TESTS_DIR=/path/to/peft"; exit 1; }
	PEFT_TESTS_DIR="$(abspath $(PEFT_TESTS_DIR))" $(TEST_ENV) $(BIN)/python -m pytest -q -s $(ARGS) tests/hydralora/peft_tests

lint: install types ## Check style and formatting with ruff, then the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## Check the types of the layers, the configurations and the extension protocol
	$(BIN)/mypy

format: install ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## lint, types and test

constraints: install ## Rewrite constraints.txt: the newest versions that pyproject.toml admits
	$(UV) venv --quiet --clear --seed --python $(BIN)/python .venv-constraints
	$(UV) pip install --quiet --python .venv-constraints ".[$(EXTRAS)]"
	grep '^#' constraints.txt > .venv-constraints/pins
	$(UV) pip freeze --python .venv-constraints | grep -vE '^(llava-extensions|pip)\b' >> .venv-constraints/pins
	mv .venv-constraints/pins constraints.txt
	rm -rf .venv-constraints

# Test tools are not lowered: what runs under them is tested, not they.
constraints-lowest: install ## Rewrite constraints-lowest.txt: the lowest version of each direct dependency
	mkdir -p .venv-constraints
	$(COMPILE) --resolution lowest-direct $(LOWEST_RUN_EXTRAS:%=--extra %) pyproject.toml --output-file .venv-constraints/lowest.txt
	grep '^#' constraints-lowest.txt > .venv-constraints/pins
	$(COMPILE) --constraint .venv-constraints/lowest.txt $(LOWEST_RUN_EXTRAS:%=--extra %) --extra dev pyproject.toml >> .venv-constraints/pins
	mv .venv-constraints/pins constraints-lowest.txt
	rm -rf .venv-constraints

clean: ## Remove the environments and everything that tools have cached
	rm -rf $(VENV) $(CORE) $(ALONE) $(LOWEST) $(SERVING)-* $(LATEST) $(UPSTREAM) $(LMMS) $(WHEEL) .venv-constraints build *.egg-info .pytest_cache .ruff_cache .mypy_cache

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

$(ALONE)/.installed: $(VENV)/.installed
	$(UV) venv --quiet --clear --python $(BIN)/python $(ALONE)
	$(UV) pip install --quiet --python $(ALONE) --constraint constraints.txt torch transformers peft
	@touch $@

$(LOWEST)/.installed: $(VENV)/.installed constraints-lowest.txt
	$(UV) venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(UV) pip install --quiet --python $(LOWEST) --constraint constraints-lowest.txt \
		--build-constraint constraints-lowest.txt --editable ".[$(LOWEST_EXTRAS)]"
	@touch $@

$(SERVING)-%/.installed: $(VENV)/.installed constraints-lowest.txt
	$(UV) venv --quiet --clear --python $(BIN)/python $(SERVING)-$*
	grep -vE '^(transformers|tokenizers|huggingface-hub)==' constraints-lowest.txt > $(SERVING)-$*/constraints.txt
	$(UV) pip install --quiet --python $(SERVING)-$* --constraint $(SERVING)-$*/constraints.txt \
		--build-constraint $(SERVING)-$*/constraints.txt --editable ".[$(LOWEST_EXTRAS)]" "transformers==$*.*"
	@touch $@

# A folder beside the environment: all that lmms-eval asks for would change versions that are tested here.
$(LMMS)/.installed: $(VENV)/.installed tests/llava/eval/lmms.txt
	rm -rf $(LMMS)
	$(UV) pip install --quiet --python $(VENV) --target $(LMMS) --no-deps --requirement tests/llava/eval/lmms.txt
	@touch $@

$(UPSTREAM_READY): $(VENV)/.installed $(UPSTREAM_PINS)
	$(UV) venv --quiet --clear --python "$(UPSTREAM_PYTHON)" $(UPSTREAM)
	grep -v '^deepspeed' $(UPSTREAM_PINS) > $(UPSTREAM)/first.txt
	$(UV) pip install --quiet --python $(UPSTREAM) --requirement $(UPSTREAM)/first.txt
	DS_BUILD_OPS=0 $(UV) pip install --quiet --python $(UPSTREAM) --no-build-isolation --requirement $(UPSTREAM_PINS)
	@touch $@
