# Each target does its own set-up: `make test` on a fresh clone needs Python >= 3.11, a C++ compiler
# and make; cmake, ninja and torch come from pip. With CUDA: nvcc, and a torch that has CUDA.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
VENV_CUDA ?= .venv-cuda
TORCH_CUDA ?= torch==2.11.0
# Of the CUDA machine that `make gpu-carry` builds for.
PYTHON312 ?= python3.12
VENV_CARRY ?= .venv-carry
CARRY_ARCHS ?= 9.0

QUIET := --quiet --disable-pip-version-check
PY := $(VENV)/bin/python
PY_CUDA := $(VENV_CUDA)/bin/python
STAMP := $(VENV)/.installed-$(subst ==,-,$(TORCH))
# What this torch's CUDA build asks for, in the version that it asks for.
CONSTRAINTS := $(wildcard requirements/$(subst ==,-,$(TORCH)).txt)
STAMP_CUDA := $(VENV_CUDA)/.installed-$(subst ==,-,$(TORCH_CUDA))
PY_CARRY := $(VENV_CARRY)/bin/python
STAMP_CARRY := $(VENV_CARRY)/.installed-$(subst ==,-,$(TORCH_CUDA))
EXPERIMENTS := tests/experiments
NATIVE := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: venv build test test-experiments matrix bench soak lint cuda-compile cuda-link-check gpu-carry clean

venv: $(STAMP)

$(STAMP): $(wildcard requirements/*.txt)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(QUIET) $(TORCH) -r requirements/dev.txt \
		$(addprefix --constraint ,$(CONSTRAINTS))
	touch $@

# Editable: Python changes need no rebuild, and a rebuild compiles only what changed.
build: venv
	$(PY) -m pip install $(QUIET) --no-build-isolation --no-deps --editable .
	@$(PY) -c "import fpi_cuda; print('built:', fpi_cuda.build_info())"

# The library's and the benchmarks'; BUDGET: the processor seconds that they may cost.
test: build
	$(PY) -m pytest --ignore=$(EXPERIMENTS) $(addprefix --processor-budget ,$(BUDGET))

test-experiments: build
	$(PY) -m pytest $(EXPERIMENTS) $(addprefix --processor-budget ,$(BUDGET))

# All tests under each torch that is supported, and without triton. Long, and a download of gigabytes.
matrix:
	PYTHON=$(PYTHON) .ci/matrix

# All tests, the long ones too, with many more examples.
soak: build
	HYPOTHESIS_PROFILE=soak $(PY) -m pytest -m "slow or not slow"

bench: build
	$(PY) -m benchmarks quick
	rm -rf build/denoise
	$(PY) -m experiments denoise train --methods FPI_NN-25 feedforward-25 --seeds 0 --set epochs=2 \
		--threads 1 --out build/denoise

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE)
	$(PY) -m mypy
	$(PY) -m benchmarks.sources

# Compiles the CUDA kernels, with registers and spills, under any torch; nvcc is all it needs.
cuda-compile: venv
	PATH="$(abspath $(VENV))/bin:$$PATH" TORCH_CUDA_ARCH_LIST="8.0 9.0 9.0a" \
		cmake -S . -B build/cuda-compile -G Ninja \
		-DPython_EXECUTABLE=$(abspath $(PY)) -DFPI_CUDA_BUILD=cpu -DFPI_CUDA_OBJECTS=ON
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build build/cuda-compile --target cuda_objects

# Links and loads the CUDA library under a torch that has CUDA (a download of gigabytes); no device
# is needed. Installed apart, so that the build in the tree stays what it is.
cuda-link-check: $(STAMP_CUDA)
	FPI_CUDA_BUILD=cuda $(PY_CUDA) -m pip install $(QUIET) --no-build-isolation --no-deps --upgrade \
		--target build/cuda-link-check .
	PYTHONSAFEPATH=1 PYTHONPATH=build/cuda-link-check $(PY_CUDA) .ci/cuda_link_check.py

$(STAMP_CUDA): requirements/build.txt
	test -x $(PY_CUDA) || $(PYTHON) -m venv $(VENV_CUDA)
	$(PY_CUDA) -m pip install $(QUIET) $(TORCH_CUDA) -r requirements/build.txt
	touch $@

# What benchmarks/on_gpu.sh uses on a CUDA machine without network: the libraries built ahead, each
# loaded here once, and packages that the tests and benchmarks import.
gpu-carry: $(STAMP_CARRY)
	rm -rf gpu-carry build/gpu-carry
	FPI_CUDA_BUILD=cuda TORCH_CUDA_ARCH_LIST="$(CARRY_ARCHS)" CUDAFLAGS=--compress-mode=size \
		$(PY_CARRY) -m pip install $(QUIET) --no-build-isolation --no-deps --target build/gpu-carry .
	strip --strip-unneeded build/gpu-carry/fpi_cuda/*.so
	PYTHONSAFEPATH=1 PYTHONPATH=build/gpu-carry $(PY_CARRY) .ci/cuda_link_check.py
	mkdir gpu-carry && cp build/gpu-carry/fpi_cuda/*.so gpu-carry
	while read -r package; do \
		$(PY_CARRY) -m pip install $(QUIET) --no-deps --no-compile \
			--target "gpu-carry/packages/$${package%%=*}" "$$package" || exit; \
	done < requirements/carry.txt
	$(PY_CARRY) -m benchmarks.on_gpu seal

$(STAMP_CARRY): requirements/build.txt
	@command -v $(PYTHON312) > /dev/null || { echo "make gpu-carry: $(PYTHON312) was not found;" \
		"name a Python 3.12 that has its headers: make gpu-carry PYTHON312=/path/to/python3.12"; exit 1; }
	test -x $(PY_CARRY) || $(PYTHON312) -m venv $(VENV_CARRY)
	$(PY_CARRY) -m pip install $(QUIET) $(TORCH_CUDA) -r requirements/build.txt
	touch $@

clean:
	rm -rf build dist gpu-carry *.egg-info fpi_cuda/*.so
