# make demo          distil a real model on this machine's CPU (examples/demo)
# make check         formatting, lint, types, tests: what CI runs
# make check-latest  the layout and step tests on Python 3.12 with the newest Megatron-Core
# make bench-fused-head  time and memory of the fused head beside dense torch and TRL (about 15 minutes)
# make bench-rollout     tokens per second of generation beside transformers (after make demo; an hour or more)
# make format        rewrite files as `make check` wants them
# make clean         remove environments, caches and build output (runs/ stays)
#
# Each target makes its own environment, .venv-*, and makes it anew when setup.py or this file changes.

# The interpreter. Unset: the first of 3.11, 3.12, 3.13, 3.10 that is found (3.12, 3.13 for check-latest).
PYTHON ?=

# PyTorch is installed first, by this pin, from this index. Unset, TORCH_INDEX means PyPI, whose Linux builds hold
# CUDA (about 3 GB): right for a GPU, and fine on a CPU. For a small download on a machine without a GPU:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

# Megatron-Core of `demo` and `check`, the newest for Python 3.10 and 3.11; of `check-latest`, the newest of all.
MEGATRON ?= megatron-core==0.16.1
MEGATRON_LATEST ?= megatron-core==0.19.2

# Passed to pytest by `check`, such as: make check PYTEST_ARGS="-x tests/unit"
PYTEST_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo check check-latest bench-fused-head bench-rollout format clean

# Two ranks with several threads each would fight over two cores, and sums over threads change with their number.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# $(call make_environment,FOLDER,PYTHON VERSIONS,EXTRA,MEGATRON): -qq keeps pip to errors
define make_environment
	@python="$${PYTHON:-$$(tools/find_python.sh $(2))}"; \
	echo "Making $(1) with $$python (a few minutes the first time)"; \
	rm -rf $(1); \
	"$$python" -m venv $(1); \
	pip="$(1)/bin/python -m pip --disable-pip-version-check install -qq"; \
	$$pip $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"; \
	$$pip "$(TORCH)" "$(4)" -e ".[$(3)]"; \
	touch $(1)/installed
endef
export PYTHON

.venv-demo/installed: setup.py Makefile
	$(call make_environment,.venv-demo,3.11 3.12 3.13 3.10,demo,$(MEGATRON))

.venv-check/installed: setup.py Makefile
	$(call make_environment,.venv-check,3.11 3.12 3.13 3.10,dev,$(MEGATRON))

.venv-latest/installed: setup.py Makefile
	$(call make_environment,.venv-latest,3.12 3.13,dev,$(MEGATRON_LATEST))

.venv-bench/installed: setup.py Makefile
	$(call make_environment,.venv-bench,3.11 3.12 3.13 3.10,bench,$(MEGATRON))

demo: .venv-demo/installed
	@PATH="$(CURDIR)/.venv-demo/bin:$$PATH" examples/demo/run.sh

check: .venv-check/installed
	@export PATH="$(CURDIR)/.venv-check/bin:$$PATH"; start=$$SECONDS; \
	echo "== ruff format"; ruff format --check .; \
	echo "== ruff check"; ruff check .; \
	echo "== mypy"; mypy; \
	echo "== pytest"; $(TEST_ENVIRONMENT) pytest -q $(PYTEST_ARGS); \
	echo "make check: formatting, lint, types and tests passed in $$((SECONDS - start)) seconds"

check-latest: .venv-latest/installed
	@PATH="$(CURDIR)/.venv-latest/bin:$$PATH" $(TEST_ENVIRONMENT) pytest -q tests -k "layout or step" $(PYTEST_ARGS)

bench-fused-head: .venv-bench/installed
	@.venv-bench/bin/python benchmarks/fused_head.py

bench-rollout: .venv-bench/installed
	@.venv-bench/bin/python benchmarks/rollout.py

format: .venv-check/installed
	@.venv-check/bin/ruff format .
	@.venv-check/bin/ruff check --fix .

clean:
	rm -rf .venv-* .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
