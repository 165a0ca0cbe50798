# Every target sets up what it needs: a virtual environment in .venv with the pins of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NATIVE := $(wildcard csrc/*) CMakeLists.txt pyproject.toml constraints.txt

# The suite starts some hundred processes, each of which would compile the package (0.3 s) where that is not kept.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test conformance check fix bench beside gpu test-ray test-page test-big test-arm64 mergekit-suite build clean

# Without isolation what is compiled stays: a change compiles its own files, a wheel none (replicate.cu alone is 70 s).
$(STAMP): $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt scikit-build-core pybind11 ninja cmake
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

build: $(STAMP)

demo: $(STAMP)  ## train a base and three specialists, merge them, show who knows what
	$(BIN)/python demo/run.py

test: $(STAMP)  ## the whole suite: no GPU, no network
	$(BIN)/python -m pytest -m 'not gpu and not big and not arm64 and not conformance and not ray and not page' --numprocesses auto --maxprocesses 8 --dist worksteal

conformance: $(STAMP)  ## recipes as people publish them, by fastmerge and mergekit; DNA transfer and merges of every architecture
	$(BIN)/python -m pytest -m 'not ray and not page and not gpu and not big' tests/conformance tests/dna tests/adamerging tests/search tests/faults \
	  --numprocesses auto --maxprocesses 8 --dist worksteal

check: $(STAMP)  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.cu csrc/*.h tests/*/*.cpp

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.cu csrc/*.h tests/*/*.cpp

bench: $(STAMP)  ## kernels beside memcpy, methods, calls, whole merges beside mergekit and the floor
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-autosave
	$(BIN)/python bench/merges.py

beside: $(STAMP)  ## this build beside that of another work tree, TREE, in one run
	$(BIN)/python bench/beside.py $(TREE)

test-ray: $(STAMP)  ## farms on a real Ray of two nodes on this machine: a minute
	$(BIN)/python -m pip install --quiet -c constraints.txt ray
	$(BIN)/python -m pytest -m ray

test-page: $(STAMP)  ## the pages in a headless Chromium (Debian: chromium)
	$(BIN)/python -m pip install --quiet -c constraints.txt playwright
	$(BIN)/python -m pytest -m page

test-big: $(STAMP)  ## tensors of more than 2^31 elements, on sparse files: 20 GB of disk, 3 minutes
	$(BIN)/python -m pytest -m big

mergekit-suite: $(STAMP)  ## mergekit's own tests, from its sdist, with the adapter installed: 2 minutes
	$(BIN)/python tests/peers/mergekit_suite.py

test-arm64: $(STAMP)  ## the kernels of arm64 in qemu: a minute
	$(BIN)/python -m pytest -m arm64 --numprocesses auto --maxprocesses 8 --dist worksteal

# Without the virtual environment and without a network: the machine's own Python, torch and triton.
BUDGET ?= 540
gpu:  ## everything that needs a CUDA device, in resumable parts: PARTS, BUDGET, WHEELS, FRESH, RETRY
	$(PYTHON) -m bench.gpu --parts "$(PARTS)" --budget $(BUDGET) $(if $(WHEELS),--wheels "$(WHEELS)") \
	  $(if $(COMMIT),--commit "$(COMMIT)") $(if $(FRESH),--fresh) $(if $(RETRY),--retry)

clean:
	rm -rf $(VENV) build dist .cache
