# make train         set up, then train on 5,000 MNIST digits and draw the figures
# make test          set up, then lint, types, documentation and every test
# make docs          set up, then make the documentation's site, build/docs/index.html
# make speed         set up, then time training and sampling beside Flax, PyTorch, Keras and pythae
# make constraints   write the newest versions of all dependencies into constraints.txt
# Another interpreter: make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SITE := $(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going -c docs . build/docs

.PHONY: train test docs speed constraints clean

train: $(VENV)/installed
	$(BIN)/jaxvae train --batch-size 16

test: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(SITE)
	$(BIN)/pytest

docs: $(VENV)/installed-dev
	$(SITE)

speed: $(VENV)/installed
	$(BIN)/python experiments/speed/run.py

# One file for every supported Python: environment markers choose.
constraints:
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv
	build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev --upgrade \
		--no-header --no-annotate --output-file constraints.txt pyproject.toml

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable ".[dev]"
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
