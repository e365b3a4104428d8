# Each target alone works on a bare machine with Python >= 3.10: it makes .venv if it is missing, installs, and runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test soak faults lint docs bench

quickstart: .venv/.installed
	$(BIN)/python recipes/train.py -m experiment=digits trainer/strategy=ddp,ssp,dssp,bounded-delay hydra.sweep.dir=outputs/quickstart
	$(BIN)/python recipes/compare.py outputs/quickstart

# More processes than cores: half of the time of two of them was waiting, for processes that start, hang or are killed.
test: .venv/.installed
	$(BIN)/python -m pytest -n 3 --dist worksteal

soak: .venv/.installed
	LIGHTNING_STALE_SOAK_EVENTS=1000000 LIGHTNING_STALE_SOAK_SEED=$$(date +%s) $(BIN)/python -m pytest -s tests/unit/coordinator/test_machine.py

faults: .venv/.installed
	$(BIN)/python benchmarks/faults.py --faults 1000

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: .venv/.installed
	$(BIN)/python benchmarks/exchange.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/overlap.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/apply_rules.py
	$(BIN)/python benchmarks/paradigms.py
	$(BIN)/python benchmarks/monitor.py
	$(BIN)/python benchmarks/simulation.py
	$(BIN)/python benchmarks/pages.py

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[recipes,dev]'
	touch $@
