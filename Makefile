# `make help` lists what one can do. Every target works from a bare clone.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The release that goes with that torch; torch without CUDA does not bring it along.
TRITON ?= triton==3.7.1
VENV ?= .venv
OUT ?= out/demo
SUITES ?= layers step memory inference compaction stats defense

RUN = $(VENV)/bin
BUILT = $(VENV)/.built
SOURCES = $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test sanitize emulate docs lint format wheel results bench gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.tools:
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --upgrade "pip>=23"
	$(RUN)/pip install --quiet "$(TORCH)" "$(TRITON)" "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.21" ninja
	@touch $@

# Editable, so that Python changes need no rebuild; C++ changes are rebuilt incrementally.
$(BUILT): $(VENV)/.tools $(SOURCES)
	$(RUN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

demo: $(BUILT) ## train a backdoored network on real images, defend it, show before and after
	$(RUN)/mnp-fast demo --out $(OUT)

test: $(BUILT) ## run the tests
	$(RUN)/python -m pytest

# Builds of their own, each in an environment of its own that takes the packages from the other one.
build/sanitize/.built: OPTION = MNP_SANITIZE
build/emulate/.built: OPTION = MNP_EMULATE_AVX512
PRELOAD = $(foreach name,libasan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))

build/%/.built: $(BUILT)
	$(RUN)/python -m venv --clear --without-pip $(@D)/venv
	$(RUN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(@D)/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	$(RUN)/pip --python $(@D)/venv/bin/python install --quiet --no-build-isolation --no-deps \
		--ignore-installed -Cbuild-dir=$(@D)/objects -Ccmake.define.$(OPTION)=ON -Cinstall.strip=false \
		-Ccmake.define.CMAKE_CXX_COMPILER=$(CXX) --editable .
	@touch $@

sanitize: build/sanitize/.built ## run the operators' tests under AddressSanitizer and UBSan (GCC)
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(<D)/venv/bin/python -m pytest -p no:cacheprovider --capture=sys tests/ops

emulate: build/emulate/.built ## run the operators' tests on the AVX-512 kernels, compiled for AVX2
	MNP_FAST_CPU=avx512 $(<D)/venv/bin/python -m pytest -p no:cacheprovider tests/ops

docs: $(BUILT) ## write the API reference to out/api; a warning is an error
	$(RUN)/python -m sphinx -qEW --keep-going docs/api out/api

lint: $(BUILT) ## check style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(BUILT) ## format Python and C++
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh') \
		$$(find tests -name '*.cpp' -o -name '*.h')

wheel: $(BUILT) ## build a wheel into wheels/
	$(RUN)/pip wheel --no-build-isolation --no-deps --wheel-dir wheels .

results: $(BUILT) ## write docs/results.md; models without stored figures are run first
	$(RUN)/python -m benchmarks.demo_results --run

bench: $(BUILT) ## run all benchmark suites beside torch, store their figures and draw them
	@status=0; for suite in $(SUITES); do \
	  $(RUN)/python -m benchmarks.run --suite $$suite --json benchmarks/results/$$suite.json \
	    || status=1; \
	done; $(RUN)/python -m benchmarks.chart && exit $$status

gpu: ## build, test and time the CUDA kernels where there is a device; writes out/gpu.md
	PYTHON=$(PYTHON) benchmarks/gpu.sh out/gpu.md

clean: ## remove what was built
	rm -rf $(VENV) build wheels out
