PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test clean

# Quantize the model inside the package to 2 bits and show what it cost.
demo: $(READY)
	$(BIN)/python -m quip.run demo pydoc --wbits 2 --quant ldlq --incoh_processing --compare

# Style, types, the direction of imports, and all tests.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n auto --dist loadfile

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable ".[test]"
	touch $(READY)

clean:
	rm -rf .venv
