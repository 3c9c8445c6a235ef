# The front door. Every target is a thin call of a Python module that can be run by hand; `make` prints them.

TASK   ?= slang
MODEL  ?= gemma-3-270m
PEFT   ?= lora
PYTHON ?= python3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# --- environments ---------------------------------------------------------------------------------------------
# A stamp file per lock file: a second run starts at once, a renewed lock is installed.
# torch, in this order: the one this Python already has (a container's), a wheel from pip's own wheel folder
# (--find-links, for machines without network), else the build that fits the machine's GPU or CPU.
TORCH := $(shell sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml | head -n 1)

define install_environment
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing. Install it: sudo apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); 3.11 or 3.12 is needed. Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing. Install it: sudo apt-get install python3-venv"; exit 1; }
	@echo "Installing $< into $(@D) (once; about 2 GB, a few minutes)"
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		echo "torch: the one $(PYTHON) already has"; $(PYTHON) -m venv --clear --system-site-packages $(@D); \
	else $(PYTHON) -m venv --clear $(@D); fi
	@sed -n '/^uv==/,/[^\\]$$/p' $< > $(@D)/uv.lock && $(@D)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r $(@D)/uv.lock
	@$(@D)/bin/python -c 'import torch' 2>/dev/null || \
		$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-index --no-deps $(TORCH) 2>/dev/null || \
		$(@D)/bin/uv pip install --python $(@D)/bin/python --torch-backend auto $(TORCH)
	$(@D)/bin/uv pip install -q --python $(@D)/bin/python --no-deps --require-hashes -r $<
	@touch $@
endef

.venv/train.stamp: train.lock
	$(install_environment)

.venv/dev.stamp: dev.lock .venv/train.stamp
	@.venv/bin/uv pip install -q --python .venv/bin/python --no-deps --require-hashes -r $<
	@touch $@

.venv-serve/serve.stamp: serve.lock
	$(install_environment)

.PHONY: lock
lock: .venv/train.stamp  ## renew the lock files from pyproject.toml
	cd $(CURDIR) && for extra in train serve; do \
		.venv/bin/uv pip compile -q --upgrade --extra $$extra pyproject.toml -o $$extra.lock || exit 1; done
	.venv/bin/uv pip compile -q --upgrade --extra dev -c train.lock pyproject.toml -o dev.lock

.PHONY: help
help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20
