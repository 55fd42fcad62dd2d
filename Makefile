# Two commands do everything on a machine with Python and a C++ compiler: make demo, make test.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
NATIVE := $(wildcard csrc/*.h csrc/*/*)

.PHONY: demo test peft-suite stress bench lint types wheel clean

demo: $(VENV)/.ready  ## transfer a small ViT to a new domain with few labels, by SNELL and its peers
	$(BIN)/snell demo

test: $(VENV)/.ready  ## every test
	$(BIN)/python -m pytest

peft-suite: $(VENV)/.ready  ## PEFT's own tests, from its source archive, with SNELL beside LoRA
	$(BIN)/python -m tests.peft_suite

stress: $(VENV)/.ready  ## training under random adapter events and kills, beside training that nothing happens to
	$(BIN)/python -m tests.stress

bench: $(VENV)/.ready  ## one layer's forward and backward beside the floor, LoRA and the published algorithm
	$(BIN)/snell bench layer

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

# The wheel to give away: built from the source archive, with the native library, and tagged manylinux by the versions of
# the symbols it needs. libgomp is not copied into it: torch is loaded first and brings one, and a second would be an
# OpenMP runtime with threads of its own. (Wheels of torch up to 2.9 rename theirs: the system's is loaded there.)
wheel: $(VENV)/.ready  ## dist/snell-*.tar.gz and, built from it, dist/snell-*-py3-none-PLATFORM.whl
	rm -rf dist build
	$(BIN)/python -m build --quiet .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl

# torch goes first: what the constraints pin is what every later step finds installed.
$(VENV)/.ready: pyproject.toml constraints.txt setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist out snell/*.so *.egg-info
