# Two commands for a new machine: `make demo` and `make test`. Each makes its own environment from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

NEWEST ?= $(PYTHON)
# What `pip` brings for another Python is newer. PyTorch is left out, and so are the tests that need it.
NEWEST_VENV := .venv-newest
NEWEST_TESTS := $(addprefix tests/test_,imports.py records.py schedules.py samplers.py distances.py routing.py \
	sources.py losses.py products.py checkpoints.py generate.py sampling.py)
DEMO := sample.py --checkpoint fashion --labels 0,1,2,3,4,5,6,7,8,9 --rows 6 --routing --growth=5

.PHONY: demo test test-newest nightly lint clean

demo: $(VENV)/installed
	$(BIN)/python $(DEMO) --out out/demo
	@echo "For the other commands of the README: source $(VENV)/bin/activate"

test: $(VENV)/installed-test lint
	$(BIN)/python -m pytest

test-newest:
	rm -rf $(NEWEST_VENV) out/demo-newest
	$(NEWEST) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install --quiet --editable . pytest pytest-xdist
	$(NEWEST_VENV)/bin/python -W error::SyntaxWarning -c 'import jax, dydit_jax, sys; print("Python", sys.version, "JAX", jax.__version__)'
	$(NEWEST_VENV)/bin/python $(DEMO) --out out/demo-newest
	$(NEWEST_VENV)/bin/python -m pytest $(NEWEST_TESTS)

nightly: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

$(VENV)/python-version:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dydit-jax needs Python 3.11 or newer; set PYTHON=python3.12, say.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/python --version > $@

$(VENV)/installed: $(VENV)/python-version pyproject.toml requirements.txt
	@echo "Installing dydit-jax into $(VENV) (about a minute)."
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "Installing what the tests compare with."
	$(BIN)/pip install --quiet --editable '.[test]'
	@# Without what it depends on: it would bring a torchvision that does not fit every build of torch.
	$(BIN)/pip install --quiet --no-deps torch-fidelity
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST_VENV) out/demo out/demo-newest
