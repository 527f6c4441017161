# `make demo` and `make test` set themselves up: a venv, torch, the package. Both run on CUDA where torch has it; the tests then
# also run on the GPU what belongs there. A torch that PYTHON has is used, as on a GPU machine it fits the driver.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Else this one is installed. Any torch from 2.4 on works; PyPI's is a CUDA build on Linux. For a smaller one:
# `make demo TORCH=torch PIP_EXTRA_INDEX_URL=<index of CPU builds>`. A torch that the venv has already is kept.
TORCH ?= torch==2.13.0

.PHONY: demo test hosts fuzz lint bench clean

$(BIN)/.base: pyproject.toml
	$(PYTHON) -m venv $$($(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[standalone]"
	touch $@

$(BIN)/.test: $(BIN)/.base
	$(BIN)/pip install --quiet -e ".[standalone,test]"
	touch $@

demo: $(BIN)/.base
	$(BIN)/slipstream demo --out out

# Checkers of others, where they can be installed; tools/checkers.py names one that is missing.
$(BIN)/.checkers: $(BIN)/.test
	@$(BIN)/pip install --quiet -e ".[checkers]" && touch $@ || echo "The checkers of others cannot be installed here."

lint: $(BIN)/.checkers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/checkers.py
	# mypy needs the package under its name, whatever the checkout's folder is called.
	mkdir -p build && ln -sfn .. build/slipstream
	cd build && $(abspath $(BIN))/mypy --config-file ../pyproject.toml $(addprefix -p slipstream.,core cow stream search edit lmd cli nodes)

test: $(BIN)/.test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The host tests on every checkout of ComfyUI in COMFYUI_PATHS, separated by colons; all are tried, and one that fails fails the target.
hosts: $(BIN)/.test
	@test -n "$(COMFYUI_PATHS)" || { echo "Set COMFYUI_PATHS to checkouts of ComfyUI, separated by colons."; exit 2; }
	@failed=0; for path in $$(echo "$(COMFYUI_PATHS)" | tr ':' ' '); do echo "== $$path"; \
	COMFYUI_PATH=$$path $(BIN)/python -m pytest tests/host -q || failed=1; done; exit $$failed

# Odd and hostile inputs: `make test` tries 25 of each kind, this 10,000 in all.
fuzz: $(BIN)/.test
	SLIPSTREAM_FUZZ=600 $(BIN)/python -m pytest tests/fuzz -n 2 -q

# One table of every technique against its best alternative, written to docs/benchmarks.md; fails beyond a limit. Each script of
# benchmarks/ measures one technique alone, in full.
bench: $(BIN)/.base
	$(BIN)/python benchmarks/whole.py

clean:
	rm -rf $(VENV) build *.egg-info
