# Three commands: `make demo`, `make check` (lint, types, imports, the quick tests: minutes) and `make test` (also the
# slow ones; with ALL=1 large models and shapes, and every combination). Each sets up .venv by itself. WORKERS=8 uses
# more processes.
# `make docs` serves the manual of docs/ on http://127.0.0.1:8000; .venv/bin/mkdocs build writes it to build/manual.
# `make bench` measures the ops and a model here and adds a file to bench/results/<machine>/.
# `make proof` trains a small model, prunes it and counts what that costs and changes (build/proof; UPDATE=1 keeps it).
# `make emulate` runs compiled kernels without a GPU, one shape of each, `make emulate ALL=1` all of their tests
# (build/emulate keeps what was compiled).
# `make gpu` tests and measures on an NVIDIA GPU, from the checkout and with the Python there is (PYTHON=), which
# needs torch, triton and pytest, in BUDGET seconds; ONLY=smoke,models runs some parts. Results go to $OUT, else to
# bench/results/<gpu>; DVIT_COMMIT names the commit where there is no .git. `make gpu-second` measures what is to be
# tried next beside what is there.
# `make gpu-cache` compiles that suite's kernels beforehand, into build/gpu-cache, to be taken along.
# `make native` builds and tests the native library of kernels/csrc: as it is shipped, under AddressSanitizer and
# UBSan, under ThreadSanitizer, and, where nvcc is, the CUDA side (build/native*; JOBS=2).
# `make aot` compiles the kernels for GPUs that are not here; TRITON=3.6.0 or =newest takes
# another Triton (kept under build/ until `make clean`), UPDATE=1 writes the table.
# `make dist` builds the wheel and the sdist into dist/, and uses the wheel in a fresh environment (build/dist).
PYTHON ?= python3
BIN := .venv/bin
USABLE := .venv/.usable
READY := .venv/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.PHONY: demo docs lint check test emulate bench proof gpu gpu-second gpu-cache native aot dist clean
.DELETE_ON_ERROR:

# What a user installs, which is all that the demo needs; and what developers need on top.
$(USABLE): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[cpu,probe]'
	touch $@

$(READY): $(USABLE)
	$(INSTALL) '.[dev]'
	touch $@

DIGITS := bench/proof/digits-0.7.pth

demo: $(USABLE)
	mkdir -p build/demo
	$(BIN)/python bench/proof/pictures.py build/demo/pictures 1000
	$(BIN)/dvit-convert $(DIGITS) -o build/demo/digits.dvit.safetensors
	$(BIN)/dvit-eval build/demo/digits.dvit.safetensors build/demo/pictures
	$(BIN)/dvit-bench build/demo/digits.dvit.safetensors --batch 64 --json build/demo/bench.json --report build/demo/bench.html
	$(BIN)/dvit-viz build/demo/digits.dvit.safetensors build/demo/pictures/*/0000[0-2].png -o build/demo/kept.png
	@printf '\nTo look at it, open these in a browser (xdg-open FILE does, on macOS open FILE):\n'
	@printf '  %s: %s\n' 'speed, as a page with charts' 'file://$(CURDIR)/build/demo/bench.html' \
	  'the patches that the model keeps' 'file://$(CURDIR)/build/demo/kept.png'

docs: $(READY)
	$(BIN)/mkdocs serve --strict

proof: $(READY)
	$(BIN)/python bench/proof/proof.py $(if $(UPDATE),--update)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(wildcard kernels/csrc/*.[ch]* kernels/csrc/*/*.[ch]*)

WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: lint
	$(PYTEST) -m 'not slow'

test: lint
	$(PYTEST) $(if $(ALL),,-m 'not large')
	$(PYTEST) --emulate quick

emulate: $(READY)
	$(PYTEST) --emulate $(if $(ALL),all,quick)

bench: $(READY)
	mkdir -p build
	$(BIN)/python -m pytest bench/suite --benchmark-json=build/benchmark.json --benchmark-columns=median,iqr,rounds

JOBS ?= 2
STRICT := -DCMAKE_C_FLAGS=-Werror -DCMAKE_CXX_FLAGS=-Werror
BUILD_NATIVE = env -u MAKEFLAGS -u MAKELEVEL cmake --build $(1) --parallel $(JOBS) && ctest --test-dir $(1) --output-on-failure

native:
	cmake -S . -B build/native -DDVIT_CUDA=OFF $(STRICT)
	$(call BUILD_NATIVE,build/native)
	cmake -S . -B build/native-sanitized -DDVIT_CUDA=OFF -DDVIT_SANITIZE=address,undefined $(STRICT)
	$(call BUILD_NATIVE,build/native-sanitized)
	cmake -S . -B build/native-threads -DDVIT_CUDA=OFF -DDVIT_SANITIZE=thread $(STRICT)
	$(call BUILD_NATIVE,build/native-threads) -R 'cpu|kernels'
	@if ! command -v nvcc >/dev/null; then echo "make native: nvcc is not here, so the CUDA side was not compiled"; else \
	set -x; cmake -S . -B build/native-cuda -DDVIT_CUDA=ON $(STRICT) && $(call BUILD_NATIVE,build/native-cuda) -R api; fi

BUDGET ?= 540
SUITE := PYTHONPATH=.:kernels $(PYTHON) bench/gpu.py

gpu:
	$(SUITE) --budget '$(BUDGET)' $(if $(ONLY),--only '$(ONLY)')

gpu-second:
	$(SUITE) --budget 170 --only second,sanitizer

# What a GPU machine finds there, of which an image may be known and nothing else: Triton for CPython 3.12.
CACHE_TRITON ?= 3.6.0
CACHE_PYTHON ?= 3.12
CACHE_FOR := build/triton-$(CACHE_TRITON)-python-$(CACHE_PYTHON)
PLATFORMS := $(foreach n,28 27 17,--platform manylinux_2_$(n)_x86_64)

gpu-cache: build/triton-$(CACHE_TRITON)/.ready $(CACHE_FOR)/.ready
	env -u TRITON_INTERPRET PYTHONPATH=.:kernels:bench build/triton-$(CACHE_TRITON)/bin/python bench/kernel_cache_build.py --for $(CACHE_FOR)

$(CACHE_FOR)/.ready: $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) --only-binary=:all: \
	  --implementation cp --python-version $(CACHE_PYTHON) $(PLATFORMS) 'triton==$(CACHE_TRITON)'
	touch $@

# Another Triton goes into a venv of its own that sees the rest of .venv behind it.
AOT := $(if $(TRITON),build/triton-$(TRITON),.venv)

aot: $(AOT)/.ready
	env -u TRITON_INTERPRET $(AOT)/bin/python kernels/aot.py $(if $(UPDATE),--update) $(if $(filter newest,$(TRITON)),--untabled)

build/triton-%/.ready: $(READY)
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'triton==$(subst newest,3.*,$*)'
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	touch $@

dist: $(READY)
	$(BIN)/python .ci/dist.py

clean:
	rm -rf .venv build dist *.egg-info
