# The two README commands are `make demo` and `make test`; each builds .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-floor test-versions bench lint clean

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

test: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n 2 --dist loadfile
	$(MAKE) test-floor

test-floor: .venv-floor/.installed
	PYTHONPATH=.venv-floor $(BIN)/python -m pytest -q -n 2 --dist loadfile $(FLOOR_TESTS)

FLOOR_TESTS := tests/test_golden.py tests/test_modeling.py tests/test_generation.py tests/test_checkpoints.py \
	tests/test_remote_code.py tests/test_distributed.py

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
	$(OTHER)/bin/python -m pytest -q -n 2 --dist loadfile $(TESTS)

# Adds rows to benchmarks/results.csv: the small shape beside its peers, on whatever device there is.
bench: $(VENV)/.installed
	$(BIN)/python scripts/benchmark.py generate --model-config configs/30m.json
	$(BIN)/python scripts/benchmark.py train --model-config configs/30m.json

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-floor .venv-versions runs
