# make demo   sets up an environment, makes trajectories, trains on them and compares, with what ships with the package
# make test   sets up an environment, then lint, types and tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
TOUR := --tools crop,depth --out $(DEMO)/traj.parquet
SKILL := --source scenes --skill outermost --tools crop --count 480 --out $(DEMO)/skill.parquet
ASKED := --source scenes --skill outermost --tools crop --count 100 --split test --out $(DEMO)/skill-test.parquet

.DEFAULT_GOAL := help
.PHONY: help demo test lint types test-slow bench clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pearl needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[scenes]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

# what is there already, unless other settings made it
define trajectories
$(BIN)/pearl-gen trajectories $(1) --resume || $(BIN)/pearl-gen trajectories $(1) --overwrite
endef

demo: $(VENV)/.demo
	@scripts/system-packages renderer
	$(call trajectories,$(TOUR))
	$(BIN)/pearl-gen view $(DEMO)/traj.parquet --out $(DEMO)/trajectories.html
	$(call trajectories,$(SKILL))
	$(call trajectories,$(ASKED))
	rm -rf $(DEMO)/training $(DEMO)/evaluation
	$(BIN)/pearl-train --data $(DEMO)/skill.parquet --direct-weight 1 --max-steps 60 --out $(DEMO)/training
	$(BIN)/pearl-eval run vlm-nano $(DEMO)/training/model --bench trajectories=$(DEMO)/skill-test.parquet --out $(DEMO)/evaluation
	@echo
	@echo "The dataset:     $(DEMO)/traj.parquet"
	@echo "Look at it:      open $(DEMO)/trajectories.html in a browser"
	@echo "Count it:        $(BIN)/pearl-gen inspect $(DEMO)/traj.parquet"
	@echo "The model:       $(DEMO)/training/model"
	@echo "The comparison:  open $(DEMO)/evaluation/report.html in a browser"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

test: lint types
	@scripts/system-packages renderer browser
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.dev
	@scripts/system-packages renderer browser
	$(BIN)/pytest -m slow --timeout 3600

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.generation speed
	$(BIN)/python -m benchmarks.generation memory

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
