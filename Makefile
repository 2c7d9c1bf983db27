# `make demo` shows the instrument at work, `make test` checks it, `make package` makes and tries what is released; each
# builds the environment it needs.
PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= demo_logs
BIN := $(VENV)/bin
OLDEST := tests/functional tests/theory tests/measurement tests/capture tests/nanogpt/test_model.py \
	tests/callbacks/test_activation_spectrum.py tests/callbacks/test_gradient_spectrum.py \
	tests/callbacks/test_do_no_harm.py tests/callbacks/test_gradient_do_no_harm.py tests/callbacks/test_head_drift.py \
	tests/callbacks/test_precision.py tests/callbacks/test_self_check.py tests/callbacks/test_tail_forecaster.py

.PHONY: demo docs package test test-cuda test-oldest lint clean

$(BIN)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(BIN)/installed
	$(BIN)/lightning-spectral fit --config examples/nanogpt.yaml --trainer.default_root_dir $(DEMO_DIR)
	@echo "See it:  $(BIN)/tensorboard --logdir $(DEMO_DIR)"

$(BIN)/installed-docs: $(BIN)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

docs: $(BIN)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "See it:  $(BIN)/python -m http.server --directory site"

lint: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(BIN)/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# On a machine with a GPU: what needs one, and whether training there is the same to the bit.
test-cuda: $(BIN)/installed
	TESTED_ON=cuda $(BIN)/python -m pytest -o filterwarnings= tests/test_cuda.py tests/callbacks/test_do_no_harm.py \
		tests/callbacks/test_gradient_do_no_harm.py tests/metrics/test_covariance_spectrum.py

package: $(BIN)/installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python .ci/check_package.py dist

# The oldest versions that pyproject.toml admits, and the parts of the suite that touch torch, lightning and torchmetrics;
# of their warnings the newest versions are judged alone.
$(VENV)-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable . pytest hypothesis transformers
	touch $@

test-oldest: $(VENV)-oldest/installed
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -o filterwarnings= $(OLDEST)

clean:
	rm -rf $(VENV) $(VENV)-oldest $(DEMO_DIR) dist site
