# `make demo` and `make test` set themselves up: a venv, torch, the package. Both run on CUDA where torch has it; the tests then
# also run on the GPU what belongs there. A torch that PYTHON has is used, as on a GPU machine it fits the driver.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Else this one is installed. Any torch from 2.4 on works; PyPI's is a CUDA build on Linux. For a smaller one:
# `make demo TORCH=torch PIP_EXTRA_INDEX_URL=<index of CPU builds>`. A torch that the venv has already is kept.
TORCH ?= torch==2.13.0

# Byte code is kept even where the environment asks for none: each process of the tests would compile torch's and diffusers' modules again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test hosts fuzz lint bench clean

# One run of pip for all that a target needs. Nothing is compiled ahead, as most of it is never imported.
PIP = $(BIN)/pip install --quiet --no-compile $$($(BIN)/python -c "import torch" 2>/dev/null || echo "$(TORCH)")

$(BIN)/.venv:
	$(PYTHON) -m venv $$($(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) $(VENV)
	touch $@

$(BIN)/.base: pyproject.toml | $(BIN)/.venv
	$(PIP) -e ".[standalone]"
	touch $@

$(BIN)/.test: pyproject.toml | $(BIN)/.venv
	$(PIP) -e ".[standalone,test]"
	touch $(BIN)/.base $@

# Checkers of others, where they can be installed; tools/checkers.py names one that is missing.
$(BIN)/.checkers: pyproject.toml | $(BIN)/.venv
	$(PIP) -e ".[standalone,test,checkers]" || { echo "The checkers of others cannot be installed here."; $(PIP) -e ".[standalone,test]"; }
	touch $(BIN)/.base $(BIN)/.test $@

demo: $(BIN)/.base
	$(BIN)/slipstream demo --out out

lint: $(BIN)/.checkers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/checkers.py
	# mypy needs the package under its name, whatever the checkout's folder is called.
	mkdir -p build && ln -sfn .. build/slipstream
	cd build && $(abspath $(BIN))/mypy --config-file ../pyproject.toml $(addprefix -p slipstream.,core cow stream search edit lmd cli nodes)

# Lint runs beside the tests, and files run in the order of their names (benchmarks, few and long, come first), so that no core is idle. What lint
# says comes after the tests. The target fails if one of the two does.
test: $(BIN)/.checkers
	@mkdir -p build; $(MAKE) --no-print-directory lint > build/lint.log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$lint; linted=$$?; cat build/lint.log; \
	echo "Exit code of the tests: $$tests, of lint: $$linted"; test $$tests = 0 -a $$linted = 0

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
