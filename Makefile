# make quickstart   the whole pipeline in little: flags/quickstart.flags
# make test         the fast tests
# make faults       runs that are killed, checkpoints that are damaged, disks that are full
# make check        format, lint, types and the fast tests
# make bench        the benchmark against other libraries, in .venv-bench; appends to benchmarks/RESULTS.md
# The first call makes .venv and installs what it needs; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3

version_ok = $(shell $(PYTHON) -c 'import sys; print("yes" * (sys.version_info >= (3, 11)))' 2>/dev/null)
install = $(1)/bin/pip install --quiet --disable-pip-version-check --editable

.PHONY: quickstart test faults check bench

quickstart: .venv/core.stamp
	.venv/bin/python train.py --flagfile=flags/quickstart.flags

test: .venv/test.stamp
	.venv/bin/python -m pytest -n 2 --dist loadfile

faults: .venv/test.stamp
	.venv/bin/python -m pytest -m slow -s tests/faults

check: .venv/test.stamp
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 2 --dist loadfile

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
	@$(if $(version_ok),,$(error needs Python 3.11 or newer, which $(PYTHON) is not; name one: make PYTHON=python3.12))
	@$(PYTHON) -m venv $*
