# Two commands on a fresh clone, with Python 3.11 to 3.13, make and a C compiler: `make demo` and `make test`.
# Each makes .venv where it is missing. PY=/path/to/python uses an environment of yours instead.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p))))
OUT ?= unshot-demo
PIP_ARGS ?=
ifndef PY
PY := .venv/bin/python
READY := .venv/.installed
endif

# Tests: all of them on two workers, and those without a model and without a process of the command line.
WORKERS ?= 2
PYTEST_ARGS ?=
LANES := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast wheel-test gpu fuzz lint types docs clean

demo: $(READY)
	$(PY) -m unshot demo --out $(OUT) --overwrite

test: $(READY)
	$(PY) -m pytest $(LANES) $(PYTEST_ARGS)

test-fast: $(READY)
	$(PY) -m pytest $(LANES) -m "not slow and not cli" $(PYTEST_ARGS)

# The wheel in an environment without torch, in a folder full of name clashes.
wheel-test: $(READY)
	$(PY) tests/wheel_test.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m mypy

docs: $(READY)
	$(PY) -m unshot.reference docs/commands.md
	$(PY) -m unshot.contracts.schemas docs/schemas

# torch goes first and alone, so that no resolver can trade the pinned build for another; llama-cpp-python compiles
# (some 10 minutes on 2 cores). A plain path to this folder (`compat`) takes no import hook, 5% of a cold `unshot plan`;
# and it is compiled as pip compiles a wheel, since PYTHONDONTWRITEBYTECODE would have each start compile it anew.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "error: $(PYTHON) is not Python 3.11 to 3.13; run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q $(PIP_ARGS) -c constraints.txt torch
	CMAKE_BUILD_PARALLEL_LEVEL=$${CMAKE_BUILD_PARALLEL_LEVEL:-$$(nproc)} \
	  .venv/bin/python -m pip install -q $(PIP_ARGS) -c constraints.txt -C editable_mode=compat -e '.[all,dev]'
	.venv/bin/python -m pip check
	.venv/bin/python -m compileall -q unshot planner tune export bench deploy
	touch $@

# What only a CUDA GPU shows, with its figures printed; elsewhere it skips and says why.
gpu: $(READY)
	$(PY) -m pytest -s -rs -p no:xdist tests/gpu

# Odd requests and command lines for an hour, beyond the thousand of each in `make test`.
fuzz: $(READY)
	$(PY) -m tests.fuzz --minutes 60

clean:
	rm -rf .venv unshot-demo build dist *.egg-info
