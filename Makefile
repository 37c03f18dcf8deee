# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv first; a second run is quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint sweep clean

help:
	@echo "make demo   analyse the bundled ViT and DeepViT and write demo/report.html"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make sweep  run the long tests"
	@echo "make clean  remove what these commands made"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "collapse_probe needs Python 3.10 or newer; choose one with PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/collapse-probe analyze --out demo
	@echo "Open demo/report.html in a browser."

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not sweep'

sweep: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist load -m sweep

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache *.egg-info
