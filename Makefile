# SPDX-License-Identifier: Apache-2.0
# Every target makes what it needs: on a fresh Debian or Ubuntu machine the compiler and venv are installed by apt-get
# (as root or through sudo), elsewhere a message says what to install.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
DEMO_OUT ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo demo-mcunet test hostile lint clean tools

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: tools $(VENV)/.run.stamp ## a shipped model learns to see with another camera, on an emulated chip; needs no file
	$(BIN)/trainlet demo --seed 0 --overwrite --out $(DEMO_OUT)

demo-mcunet: tools $(VENV)/.run.stamp ## train a published int8 model on real images, in generated C
	@if [ -z "$$TRAINLET_ASSETS" ]; then \
		echo "make demo-mcunet: no model and no images: pass the folder that holds models/mcunet-5fps.pkl and" >&2; \
		echo "                  data/sign_digits, make demo-mcunet TRAINLET_ASSETS=/path/to/assets" >&2; \
		exit 2; \
	fi
	$(BIN)/trainlet train --model "$$TRAINLET_ASSETS/models/mcunet-5fps.pkl" --data "$$TRAINLET_ASSETS/data/sign_digits" \
		--scheme 99kb --epochs 4 --seed 0 --overwrite --out $(DEMO_OUT)-mcunet

test: tools $(VENV)/.dev.stamp ## all tests; PYTEST_ARGS="-k exact" narrows them
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

hostile: tools $(VENV)/.dev.stamp ## a few hostile inputs of every kind, killed commands, and faults planted for each counter
	$(BIN)/python -m pytest -m slow tests/hostile

lint: $(VENV)/.dev.stamp ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what the targets above made, but no run
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A C compiler is a run-time need: training runs the generated C.
tools:
	@bash .ci/need

$(VENV)/bin/python: | tools
	python3 -m venv $(VENV)

$(VENV)/.run.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[data,m7]'
	@touch $@

$(VENV)/.dev.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[data,dev]'
	@touch $@ $(VENV)/.run.stamp
