# Everything is set up on the way: each target makes the virtual environment and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a large green triangle to the right of a small red circle on a yellow background
PYTEST ?=
# A thread each, and bytecode on disk: the tests start a hundred processes, which else compile all that they import.
QUICKLY := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
REHEARSE ?=

.PHONY: calibrations demo test test-all check lint size format timings rehearsal clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.run  ## one picture from the built-in model, on whatever this machine has
	mkdir -p out
	$(BIN)/vivace generate "$(PROMPT)" -o out/demo.png --overwrite

test: $(VENV)/.test  ## the CPU test suite
	$(QUICKLY) $(BIN)/pytest -n 2 --dist worksteal $(PYTEST)

test-all: $(VENV)/.test  ## the full product of cases too
	$(QUICKLY) $(BIN)/pytest -n 2 --dist worksteal -m "" $(PYTEST)

check: lint size test  ## what the continuous integration runs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

size:
	$(PYTHON) .ci/size.py

timings: $(VENV)/.run  ## cold starts of this machine, to benchmarks/<date>-cpu-timings.json
	$(BIN)/python -m vivace.bench.timings

rehearsal: $(VENV)/.test  ## the Dockerfiles' and the README's steps in fresh roots, to benchmarks/; as root
	$(BIN)/python docker/rehearse.py -o benchmarks/$$(date -u +%F)-cpu-rehearsal.json $(REHEARSE)

calibrations: $(VENV)/.run  ## fits the step caches to the built-in model; a GPU needs minutes
	$(BIN)/vivace calibrate builtin --captions 96 -o src/vivace/cache/calibrations/builtin.json
	$(BIN)/vivace calibrate builtin --captions 96 --scheduler dpmsolvermultistep -o src/vivace/cache/calibrations/builtin-dpm.json

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache

# torch first and alone: a wheel of exactly this version that the machine already holds is then taken, whichever build
# it is, and nothing else's requirements can pull another.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.run

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,dev]'
	touch $@ $(VENV)/.run $(VENV)/.test
