# make demo   set up and train the embedded model, with a report at the end
# make test   set up and run the tests
# make demo-mia   multi-image preference pairs and DPO on the embedded model
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?=
# Compiling every file of all packages takes longer than compiling only what is imported.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
NATIVE := CMakeLists.txt $(wildcard csrc/*.cpp csrc/matching/* csrc/speculation/*)
# The stamp changes with everything that the setup depends on.
STAMP := $(VENV)/.setup-$(shell cat pyproject.toml setup.py virft_fast/__init__.py constraints.txt Makefile $(NATIVE) | cksum | cut -d' ' -f1)
FUZZ_SECONDS ?= 60

.PHONY: setup demo test lint types docs package format coverage test-core fuzz check-cuda check-triton bench tiny-model demo-curves demo-mia clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "expected python >= 3.10, got $$($(PYTHON) --version 2>&1); set PYTHON=..."; exit 1; }
	@echo "setting up $(VENV) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.setup-*
	$(PIP) torch setuptools wheel ninja packaging
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@# The matcher's CUDA half is of no use to a torch without CUDA.
	VIRFT_FAST_CUDA=$${VIRFT_FAST_CUDA:-$$($(BIN)/python -c "import torch; print('auto' if torch.version.cuda else 0)")} \
		$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m virft_fast demo $(DEMO_ARGS)

# One thread per process: tests run two at a time, and some start two processes of their own.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(TEST_ARGS)

coverage: $(STAMP)
	$(MAKE) test TEST_ARGS="--cov --cov-report=term --cov-fail-under=85 $(TEST_ARGS)"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# Build the site in site/; a warning is an error, unless --quiet hides it.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Build sdist and wheel in dist/; the wheel includes the native matcher.
package: $(STAMP)
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The matcher's C++ tests, under the address and undefined-behavior sanitizers; needs cmake.
test-core:
	cmake -S . -B build/core -DVIRFT_SANITIZE=ON >/dev/null
	cmake --build build/core --parallel 2
	ctest --test-dir build/core --output-on-failure

# Fuzz the matcher with arbitrary bytes as boxes and options, under the same sanitizers; needs clang
# and its libFuzzer.
fuzz:
	cmake -S . -B build/fuzz -DVIRFT_FUZZ=ON -DVIRFT_TESTS=OFF -DCMAKE_CXX_COMPILER=clang++ >/dev/null
	cmake --build build/fuzz --parallel 2
	@mkdir -p build/fuzz/corpus
	build/fuzz/fuzz_matching -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -print_final_stats=1 \
		-artifact_prefix=build/fuzz/ build/fuzz/corpus

# Compile every .cu for all architectures, without a GPU; needs nvcc.
check-cuda: $(STAMP)
	$(BIN)/python scripts/check_cuda.py

# Print registers, spills and wide loads of every Triton kernel, compiled without a GPU.
check-triton: $(STAMP)
	$(BIN)/python scripts/check_triton.py

bench: $(STAMP)
	$(BIN)/python -m pytest -q benchmarks -rs --benchmark-storage=benchmarks/results \
		--benchmark-columns=min,median,stddev,rounds $(BENCH_ARGS)

tiny-model: $(STAMP)
	$(BIN)/python scripts/make_tiny_model.py --out virft_fast/models/tiny_qwen2_vl

demo-curves: $(STAMP)
	$(BIN)/python scripts/demo_curves.py --out docs

# One thread: the model is so small that a second one costs more time than it saves.
demo-mia: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/demo_mia.py $(DEMO_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage*
