# make quickstart   the whole pipeline in little: flags/quickstart.flags
# make test         the fast tests
# make check        the lint, the fast tests and the audit
# make lint         format, lint and types
# make audit        known vulnerabilities of what is installed; skipped where they cannot be looked up
# make faults       runs that are killed, checkpoints that are damaged, disks that are full
# make fuzz         10,100 broken inputs in one process, 50 on the command line
# make soak         the pipeline over and over for MINUTES (60); memory, descriptors and threads stay flat
# make bench        the benchmark against other libraries, in .venv-bench; appends to benchmarks/RESULTS.md
# The first call makes .venv and installs what it needs; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
MINUTES ?= 60

version_ok = $(shell $(PYTHON) -c 'import sys; print("yes" * ((3, 11) <= sys.version_info < (3, 14)))' 2>/dev/null)
install = $(1)/bin/pip install --quiet --disable-pip-version-check --editable

.PHONY: quickstart test check lint audit faults fuzz soak bench

quickstart: .venv/core.stamp
	.venv/bin/python train.py --flagfile=flags/quickstart.flags

test: .venv/test.stamp
	.venv/bin/python -m pytest -n 2 --dist loadfile

faults: .venv/test.stamp
	.venv/bin/python -m pytest -m slow -s tests/faults

check: lint test audit

lint: .venv/test.stamp
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

audit: .venv/test.stamp
	.venv/bin/python tests/audit.py

fuzz: .venv/test.stamp
	.venv/bin/python -m pytest -m slow tests/test_fuzz.py

soak: .venv/test.stamp
	PYTHONPATH=. .venv/bin/python benchmarks/soak.py --minutes=$(MINUTES)

bench: .venv-bench/bench.stamp
	.venv-bench/bin/python benchmarks/peers.py

.venv/core.stamp: setup.cfg | .venv/bin/pip
	@echo "installing into .venv; this takes some minutes, once"
	@$(call install,.venv) '.[profile]'
	@touch $@

.venv/test.stamp: setup.cfg | .venv/bin/pip
	@echo "installing into .venv; this takes some minutes, once"
	@$(call install,.venv) '.[profile,test]'
	@touch .venv/core.stamp $@

.venv-bench/bench.stamp: setup.cfg | .venv-bench/bin/pip
	@echo "installing into .venv-bench, other libraries too; this takes some minutes, once"
	@$(call install,.venv-bench) '.[bench]'
	@touch $@

.venv/bin/pip .venv-bench/bin/pip: %/bin/pip:
	@$(if $(version_ok),,$(error needs Python 3.11 to 3.13, which $(PYTHON) is not; name one: make PYTHON=python3.12))
	@$(PYTHON) -m venv $*
