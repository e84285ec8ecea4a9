# make demo   a virtual environment, installation, and an image to look at in demo-out/
# make test   what CI runs: lint, types, layers, the default tests (minutes)
# make test-all   the slow tests too
# make notebooks   executes the notebooks and writes their pages to docs/notebooks
# make docs   the documentation site in build/site

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
TICK ?= 20
# Only Python and its pip are assumed: a venv without pip of its own also works where ensurepip is packaged apart.
INSTALL = $(PYTHON) -m pip --python $(BIN)/python install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all check format docs notebooks clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --out demo-out

test: $(VENV)/.test check
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.test check
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv --without-pip $(VENV)
	$(INSTALL) pip

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): some minutes, about 1.7 GB"
	@while sleep $(TICK) >/dev/null 2>&1; do echo "still installing, $$(du -sm $(VENV) | cut -f1) MB in $(VENV)"; done & lines=$$!; \
	$(INSTALL) -e '.[demo]'; status=$$?; kill $$lines; exit $$status
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test]'
	touch $@ $(VENV)/.demo

notebooks: $(VENV)/.notebooks
	$(BIN)/python tools/notebooks.py --render

$(VENV)/.notebooks: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[notebooks]'
	touch $@

docs: $(VENV)/.docs
	$(BIN)/python tools/site_pages.py

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info
