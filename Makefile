# Targets: demo serve mini test test-slow check bench build assets clean. Each does its own set-up in .venv.
PYTHON ?= python3
STEPS ?=
BIN := .venv/bin
DEMO := $(if $(STEPS),--set train.steps=$(STEPS) --set data.root=mini-lamm:smoke --set data.root_3d=mini-scan2inst:smoke --set train.output=runs/smoke)

demo: build
	$(BIN)/octavius demo $(DEMO)

mini: build
	$(BIN)/octavius demo --config mini-2d+3d --baseline --resume

# Both cores, one thread a process; then what is about threads, alone, on two of them.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow and not threads"
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m "threads and not gpu and not slow"

test-slow: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu"

check: build
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

# The demo's model on a page; trains nothing.
serve: build
	@test -d runs/demo/model || { echo "there is no model in runs/demo yet: run make demo first"; exit 1; }
	$(BIN)/octavius serve --model runs/demo/model

bench: build
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_linear.py --csv runs/bench_table.csv
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_linear.py --sweep --csv runs/bench_sweep.csv
	$(BIN)/python benchmarks/plot_linear.py runs/bench_table.csv runs/bench_sweep.csv

assets: build
	$(BIN)/octavius assets

build: .venv/ready

.venv/ready: constraints.txt setup.py pyproject.toml tools/ptxemu/pyproject.toml $(wildcard csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel pybind11 torch || \
	  { echo "torch could not be installed: is a package index reachable, and are 5 GB free?"; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[octavius,serve,dev]' -e ./tools/ptxemu
	@touch $@

clean:
	rm -rf .venv build *.egg-info runs

.PHONY: demo serve mini test test-slow check bench assets build clean
