# `make demo`: train, stop, resume, export, re-score and sample a small model.
# `make test`: the fast tests.   `make check`: linters, types and fast tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Without a CUDA device the CPU build, named so exactly that no CUDA package can
# come in its place. Override with e.g. `make demo TORCH="torch==2.12.0"`.
ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch>=2.11,<2.14
else ifeq ($(shell uname -s),Linux)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif

# One thread, and one that sleeps where it waits: on few cores a second one, or one
# that spins, waits on whatever else runs there.
TEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: demo test slow check setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "titanlm needs Python 3.11 or newer; say which with: make demo PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" || { echo "No '$(TORCH)' where pip looks. Add PyTorch's CPU wheel index (pytorch.org, Get Started) as PIP_EXTRA_INDEX_URL, or name another build: make demo TORCH=..."; exit 1; }
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/python recipes/quickstart/demo.py

test: setup
	$(TEST) -m "not slow and not gpu"

slow: setup
	$(TEST) -m "slow and not gpu"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

clean:
	rm -rf $(VENV) runs build dist *.egg-info
