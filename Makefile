# `make demo` and `make test` are all that a fresh machine needs (Python 3.10-3.13 and make).
PYTHON ?= python3
BIN := .venv/bin
TORCH ?= torch>=2.4 torchvision

.PHONY: demo test browser lint bench kernels world clean

# the environments, made again when the requirements change: one to use, and what the tests need on top
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check $(foreach p,$(TORCH),"$(p)")
	$(BIN)/pip install -qq --disable-pip-version-check --editable ".[cli]"
	touch $@

.venv/.test-ready: .venv/.ready
	$(BIN)/pip install -qq --disable-pip-version-check --editable ".[cli,test]"
	$(BIN)/python tests/comfyui/environment.py
	$(BIN)/python tests/browser/chromium.py
	touch $@

demo: .venv/.ready
	$(BIN)/sepme demo --out demo
	@echo "Open demo/report.html"

test: .venv/.test-ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

# the page in Chromium alone
browser: .venv/.test-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

lint: .venv/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.ready
	$(BIN)/sepme bench solver
	$(BIN)/sepme bench train
	$(BIN)/sepme bench overhead
	$(BIN)/sepme bench toggle

# every configuration of the kernels, every GPU family and d_in: some minutes, no GPU needed
kernels: .venv/.ready
	$(BIN)/sepme bench kernel --aot --width 768 --width 1024 --width 2048 --out benchmarks/results

# the larger drawing world: an hour or two of training
world: .venv/.ready
	$(BIN)/python -m sepme.demo.train --world large

clean:
	rm -rf .venv demo build *.egg-info
