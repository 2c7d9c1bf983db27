# `make demo` shows the instrument at work, `make test` checks it; both build the environment they need.
PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= demo_logs
BIN := $(VENV)/bin

.PHONY: demo test lint clean

$(BIN)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(BIN)/installed
	$(BIN)/lightning-spectral fit --config examples/nanogpt.yaml --trainer.default_root_dir $(DEMO_DIR)
	@echo "See it:  $(BIN)/tensorboard --logdir $(DEMO_DIR)"

lint: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(BIN)/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

clean:
	rm -rf $(VENV) $(DEMO_DIR)
