PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test demo lint clean

# torch first and by its exact version: an open range takes gigabytes of CUDA on a machine without a GPU. DeepSpeed's
# build asks torch, so it comes after it; its own kernels are not needed.
$(VENV)/installed: setup.py requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[test,demo,app]"
	$(BIN)/pip install -q -c constraints.txt setuptools wheel ninja
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation deepspeed
	touch $@

# Two workers of one thread each: the models are too small to share a core's work out.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true $(BIN)/python -m pytest -q -n 2

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --output_dir demo

lint: $(VENV)/installed
	$(BIN)/pip install -q ruff
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) demo *.egg-info
