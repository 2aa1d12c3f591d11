# `make demo` and `make test` need Python 3.10 or newer, a C compiler and nothing else: each makes what it lacks in .venv.
# A GPU is never needed, except for gpu-test and gpu-bench, which use the Python and the torch of the machine as they are.

PYTHON ?= python3
GPU_PYTHON ?= python3
VENV ?= .venv

# what the suite is tested with; the torch of CUDA 13 pins this very triton
TORCH := 2.13.0
TRITON := 3.7.1
TRITON_OLD := 3.6.0
# what the older one compiles for: the GPU that it is used on
OLD_TRITON_FOR := 90
TRANSFORMERS := 5.17.0
TRANSFORMERS_OTHERS := 5.4.0 5.23.0
# what an older transformers needs older than the newest has it
BESIDE_5.4.0 := tokenizers==0.22.2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# a process per core, each of which takes half a gigabyte and more
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --benchmark-disable
# the checkout itself, without CUDA kernels: without isolation, since that needs nothing but the setuptools already there
HERE := STREAMKERNELS_BUILD_CUDA=0 $(PIP) --no-build-isolation "torch==$(TORCH)" "transformers==$(TRANSFORMERS)"
OVERLAYS := $(TRANSFORMERS_OTHERS:%=$(VENV)/transformers-%/installed)
OLD_TRITON := $(VENV)/triton-$(TRITON_OLD)/installed
CUDA_SOURCES = $(shell find csrc tests/packaging/cuda_on_host -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

say = @printf '\n== %s\n' "$(1)"

.PHONY: help demo test lint compile-check compile-check-cuda compile-check-triton gpu-install gpu-test gpu-bench clean

help:
	@echo "make demo           stream live captions through a small model on the CPU"
	@echo "make test           the CPU suite: reference, Triton's interpreter, transformers $(TRANSFORMERS) $(TRANSFORMERS_OTHERS)"
	@echo "make lint           ruff, mypy, clang-format"
	@echo "make compile-check  every CUDA and Triton kernel for sm_80, 90a, 100, 120: registers and spills (BUILT=_C.*.so:"
	@echo "                    the CUDA kernels of that extension, built before)"
	@echo "make gpu-test       the suite on this machine's GPU, with its own torch and without network"
	@echo "make gpu-bench      the benchmarks, likewise"
	@echo "make clean          remove $(VENV) and build/"

demo: $(VENV)/base
	$(call say,streamkernels demo)
	@$(BIN)/streamkernels demo

# TRITON_INTERPRET must be set before triton is first imported, and the other tests must not see it: a process of its own
test: $(VENV)/test $(OVERLAYS)
	@failed=; \
	run() { \
	  printf '\n== %s\n' "$$1"; shift; \
	  env "$$@" || { failed="$$failed $$?"; printf '== FAILED: %s\n' "$$*"; }; \
	}; \
	run "reference, ops, sessions, Hugging Face $(TRANSFORMERS), packaging" \
	  $(PYTEST) tests --ignore=tests/triton; \
	run "Triton kernels in Triton's interpreter" \
	  TRITON_INTERPRET=1 $(PYTEST) tests/triton; \
	for version in $(TRANSFORMERS_OTHERS); do \
	  run "Hugging Face $$version" \
	    PYTHONPATH=$(CURDIR)/$(VENV)/transformers-$$version $(PYTEST) tests/integrations; \
	done; \
	if [ -n "$$failed" ]; then printf '\nmake test: FAILED\n'; exit 1; fi; \
	printf '\nmake test: all passed\n'

lint: $(VENV)/test $(VENV)/lint
	$(call say,ruff)
	@$(BIN)/ruff check .
	$(call say,mypy)
	@$(BIN)/mypy
	$(call say,clang-format)
	@$(BIN)/clang-format --dry-run -Werror $(CUDA_SOURCES)

# only a log of ptxas says whether it makes products of a warpgroup wait for each other
ASYNCHRONOUS = $(wildcard csrc/span_attention/hopper/*.cu csrc/incremental_prefill/instances/plain.cu)

compile-check: compile-check-cuda compile-check-triton

compile-check-cuda: $(VENV)/test
	$(call say,CUDA kernels)
	@$(BIN)/python tests/compile_cuda.py $(if $(BUILT),--built "$(BUILT)")
	@$(if $(BUILT),$(BIN)/python tests/compile_cuda.py --archs 90a $(ASYNCHRONOUS))

compile-check-triton: $(VENV)/test $(OLD_TRITON)
	$(call say,Triton kernels with triton $(TRITON))
	@$(BIN)/python tests/compile_triton.py
	$(call say,Triton kernels with triton $(TRITON_OLD))
	@PYTHONPATH=$(CURDIR)/$(VENV)/triton-$(TRITON_OLD) $(BIN)/python tests/compile_triton.py $(OLD_TRITON_FOR)

gpu-install:
	$(GPU_PYTHON) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(GPU_PYTHON) -c "import streamkernels; print(streamkernels.cuda_status())"

gpu-test: gpu-install
	$(GPU_PYTHON) -m pytest tests

gpu-bench: gpu-install
	$(GPU_PYTHON) -m pytest -s $(wildcard bench/bench_*.py)

clean:
	rm -rf $(VENV) build

# -- environments: a file marks what is complete, so that an interrupted install starts over ---------------------------

# the CPU build of torch: from the configured index, else from PyTorch's own, else whatever the platform has
$(VENV)/base: pyproject.toml setup.py Makefile
	$(call say,$(VENV): Python)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"Python 3.10 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(call say,$(VENV): torch $(TORCH) for the CPU)
	@$(PIP) "torch==$(TORCH)+cpu" 2>/dev/null || \
	  $(PIP) "torch==$(TORCH)" --index-url https://download.pytorch.org/whl/cpu || $(PIP) "torch==$(TORCH)"
	$(call say,$(VENV): transformers $(TRANSFORMERS) and streamkernels without CUDA kernels)
	@$(PIP) "setuptools>=77"
	@$(HERE) -e '.[hf]'
	@touch $@

$(VENV)/test: $(VENV)/base
	$(call say,$(VENV): triton $(TRITON) and the test tools)
	@$(HERE) "triton==$(TRITON)" -e '.[hf,test]'
	@touch $@

$(VENV)/lint: $(VENV)/base
	$(call say,$(VENV): ruff, mypy, clang-format)
	@$(HERE) -e '.[hf,dev]'
	@touch $@

# other versions go into folders of their own, which PYTHONPATH puts before the installed one
$(VENV)/transformers-%/installed: $(VENV)/base
	$(call say,$(VENV): transformers $* beside it)
	@rm -rf $(@D)
	@$(PIP) --no-deps --target $(@D) "transformers==$*" $(BESIDE_$*)
	@touch $@

$(VENV)/triton-%/installed: $(VENV)/base
	$(call say,$(VENV): triton $* beside it)
	@rm -rf $(@D)
	@$(PIP) --no-deps --target $(@D) "triton==$*"
	@touch $@
