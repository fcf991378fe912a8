# Two commands: `make demo` and `make test`. Each sets up .venv by itself the first time.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	mkdir -p build/demo
	$(BIN)/python examples/write_checkpoint.py dynamicvit-deit-s build/demo/dynamicvit-deit-s.pth
	$(BIN)/dvit-convert build/demo/dynamicvit-deit-s.pth -o build/demo/dynamicvit-deit-s.dvit.safetensors
	$(BIN)/dvit-bench build/demo/dynamicvit-deit-s.dvit.safetensors --json build/demo/bench.json

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

clean:
	rm -rf .venv build *.egg-info
