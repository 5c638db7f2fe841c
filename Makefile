# SPDX-License-Identifier: Apache-2.0
#   make demo    set up, then lift cubes with the sparse and the dense policy; writes out/demo
#                (REALTIME=1: against the real clock; DEMO_ARGS: further arguments)
#   make test    set up, then check format, lint and types, and run the tests
#                (PYTEST_ARGS: further arguments, for instance test/policy or -k name)
#   make setup   only set up .venv (PYTHON: another python3; PIP_ARGS: further arguments for pip)
#   make format  rewrite the Python files in the project's format
#   make clean   remove everything that the commands above made

SHELL := /bin/bash
PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
RUN := source scripts/env.sh &&

.PHONY: demo test setup format clean

demo: setup
	@ls -d .venv/lib/python*/site-packages/robosuite > /dev/null 2>&1 || { \
		echo 'demo: the simulated robot needs Python 3.10 to 3.12: make demo PYTHON=python3.12' >&2; \
		exit 1; }
	@$(RUN) demo $(if $(REALTIME),--realtime) $(DEMO_ARGS)

# `python -m pytest` would take the folder launch/ for ROS's module of that name.
# Plugins are loaded by name only: the one that comes with ROS does not load in this pytest.
# Message fields are type-checked on assignment, which rclpy leaves out by default.
test: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	@$(RUN) PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 ROS_PYTHON_CHECK_FIELDS=1 \
		pytest $(PYTEST_ARGS)

setup:
	@PYTHON='$(PYTHON)' PIP_ARGS='$(PIP_ARGS)' scripts/setup.sh

format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv out/demo build install log *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
