PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test demo lint clean

# torch comes first and in its exact version, because an open range takes gigabytes of CUDA on a machine without a GPU.
$(VENV)/installed: setup.py requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[test,demo,app]"
	touch $@

# Two workers with one thread each, because the models are too small to share the work of a core.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true $(BIN)/python -m pytest -q -n 2

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --output_dir demo

lint: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt ruff pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) demo *.egg-info
