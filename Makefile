# Two commands do everything: `make run` and `make test`. Each sets up what it needs.

# The first Python of a supported version.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
# Where pip finds torch, and torch alone: an index of CPU builds, say. Empty: where it finds all else.
TORCH_INDEX_URL ?=
PIP_INSTALL := .venv/bin/python -m pip install --no-warn-script-location -c constraints.txt
# llama.cpp's server, for `make bench`.
LLAMA_SERVER ?= $(shell command -v llama-server)
# Test files that run side by side. Many of them wait more than they compute, so two cores have time for a third.
TEST_PROCESSES ?= 3
# Real processes on a busy machine: a test that fails is tried once more, and the summary says why it failed at first.
PYTEST := .venv/bin/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --reruns 1 -r aR
VENV := .venv
BIN := $(VENV)/bin
PROTO := protos/sluice/v1/generation.proto
PIP_AUDIT_VERSION := 2.10.1

.PHONY: help run test test-all lint format protos bench gpu audit clean

help:
	@echo 'make run     set up, serve the embedded model on http://localhost:8000 (Ctrl-C stops)'
	@echo 'make test    set up, run the test suite'
	@echo 'make test-all  the slow tests too: quick runs of every benchmark, all kernels compiled, training'
	@echo 'make lint    ruff, mypy --strict, buf lint'
	@echo 'make format  let ruff rewrite what it can'
	@echo 'make protos  regenerate the stubs of $(PROTO)'
	@echo 'make bench   measure engine, sampling, AWQ, structured output, determinism, prefix cache, transport, cancellation,'
	@echo '             overload here, and serving beside LLAMA_SERVER=.../llama-server, if there is one'
	@echo 'make gpu     on a machine with a GPU: test and measure what no other can'
	@echo 'make audit   ask an advisory database about every pinned version'
	@echo 'make clean   delete the virtual environment and caches'

run: $(VENV)/installed-serve
	@$(BIN)/python deploy/local.py

test: $(VENV)/installed-dev $(VENV)/installed-gateway
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/installed-dev $(VENV)/installed-gateway
	$(PYTEST) --hypothesis-profile=random

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/buf lint protos

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: $(VENV)/installed-dev
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I. \
		--python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTO)

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.awq
	$(BIN)/python -m benchmarks.structured_output
	$(BIN)/python -m benchmarks.determinism
	$(BIN)/python -m benchmarks.multi_turn
	$(BIN)/python -m benchmarks.transport
	$(BIN)/python -m benchmarks.cancellation
	$(BIN)/python -m benchmarks.overload
	@if test -z '$(LLAMA_SERVER)'; then \
		echo 'benchmarks.llama_cpp_server is left out: there is no llama-server (set LLAMA_SERVER=...)'; \
	elif ! $(BIN)/python -c 'import gguf' 2>/dev/null; then \
		echo "benchmarks.llama_cpp_server is left out: gguf is not installed (pip install '.[peers]')"; \
	else $(BIN)/python -m benchmarks.llama_cpp_server --server '$(LLAMA_SERVER)'; fi

gpu: $(VENV)/installed-dev
	$(BIN)/pytest tests/gpu tests/worker/model
	$(BIN)/python -m benchmarks.gpu --keep benchmarks/RESULTS.md

# Pins are read as they are: nothing of them is installed. Strict, since what the database does not answer for would
# otherwise be left out, and the rest called clean.
audit: $(VENV)/audit/bin/pip-audit
	$< --strict --disable-pip --no-deps --progress-spinner off -r constraints.txt
	$< --strict --disable-pip --no-deps --progress-spinner off -r constraints.gateway.txt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build

$(VENV)/installed-serve: pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'Sluice needs Python 3.11, 3.12 or 3.13 (set PYTHON=...)'; exit 1; }
	@echo 'Setting up $(VENV) (a few minutes, once) ...'
	@$(PYTHON) -m venv $(VENV)
	@test -z '$(TORCH_INDEX_URL)' || $(PIP_INSTALL) --no-deps --index-url '$(TORCH_INDEX_URL)' torch
	@$(PIP_INSTALL) -e '.[worker,edge]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-serve
	@$(PIP_INSTALL) -e '.[dev]'
	@# deprecated, and on some later Python perhaps not to be had: then the tests that need it are skipped
	@$(PIP_INSTALL) -e '.[quantize]' || echo 'autoawq cannot be installed: the quantize command is not tested'
	@touch $@

# In an environment of its own, which it shares no dependency with.
$(VENV)/audit/bin/pip-audit: Makefile
	@$(PYTHON) -m venv $(VENV)/audit
	@$@ --version 2>/dev/null | grep -q ' $(PIP_AUDIT_VERSION)$$' || \
		$(VENV)/audit/bin/python -m pip install --quiet pip-audit==$(PIP_AUDIT_VERSION)
	@touch $@

# In a folder of its own: see constraints.gateway.txt. The tests' own process never sees it.
$(VENV)/installed-gateway: $(VENV)/installed-dev constraints.gateway.txt
	@$(BIN)/python -m pip install --no-warn-conflicts --upgrade --target $(VENV)/gateway -c constraints.gateway.txt \
		smg smg-grpc-proto grpcio-health-checking grpcio-reflection grpcio-status || \
		echo 'smg cannot be installed: the vLLM contract and its gateway are not tested'
	@touch $@
