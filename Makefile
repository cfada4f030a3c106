# Two commands do everything on a fresh machine with Python 3.11-3.13: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
export HF_HUB_OFFLINE := 1
export JAX_PLATFORMS := cpu
export TPU_SKIP_MDS_QUERY := 1

PROMPT ?= a red 7 moving left above a blue 2 on a striped background
SEED ?= 0

.PHONY: demo serve test check-long check-convert check-tpu check-demo check-methods check-train lint newest clean

demo: $(VENV)/.core
	@mkdir -p out
	@$(BIN)/dit-generate --model demo-wan --prompt "$(PROMPT)" --seed $(SEED) --out out/demo.mp4 --sheet out/demo.png
	@echo "video: out/demo.mp4   contact sheet: out/demo.png"

serve: $(VENV)/.serve
	$(BIN)/dit-serve --model demo-wan --buckets quick

test: $(VENV)/.dev lint
	$(BIN)/pytest -n 2 -m "not long"

# What is too slow for every change, in parts of at most half an hour on 2 cores.
check-long: check-convert check-tpu check-demo check-methods check-train

check-convert: $(VENV)/.dev
	$(BIN)/pytest -m long tests/convert

check-tpu: $(VENV)/.dev
	ALLOW_MULTIPLE_LIBTPU_LOAD=1 $(BIN)/pytest -n 2 -m long tests/infer/test_tpu_memory.py

check-demo: $(VENV)/.dev
	$(BIN)/pytest -m long tests/infer --ignore tests/infer/test_tpu_memory.py --ignore tests/infer/test_plan_pairs.py

check-methods: $(VENV)/.dev
	$(BIN)/pytest -n 2 -m long tests/dit_jax tests/infer/test_plan_pairs.py

check-train: $(VENV)/.dev
	$(BIN)/pytest -m long tests/train

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The newest jax, without torch: what a user on Python 3.12+ gets today.
newest:
	sh .ci/newest

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip

$(VENV)/.core: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -qq --editable .
	@touch $@

$(VENV)/.serve: $(VENV)/.core
	$(BIN)/pip install -qq --editable ".[serve]"
	@touch $@

# torch first: its CPU build, where the index offers one.
$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install -qq "$(TORCH)"
	$(BIN)/pip install -qq --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest out
