# Two commands do everything: `make run` and `make test`. Each sets up what it needs.
PYTHON ?= python3
# Extra options for pip, such as an index that has torch's CPU build.
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PROTO := protos/sluice/v1/generation.proto

.PHONY: run test lint protos bench clean
.DEFAULT_GOAL := help
