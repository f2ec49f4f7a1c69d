# Every target sets up .venv by itself when needed: once, or again after an interruption or a change of what is required.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help pretrain finetune test test-xla test-aot test-slow soak lint docs notebooks clean
help:
	@echo "make pretrain   train a small Gemma on Python's standard library, on four simulated devices (about 6 minutes)"
	@echo "make finetune   teach that model to write docstrings, with LoRA (about 3 minutes, and 6 if it is not there yet)"
	@echo "make test       run the default tests (about 5 minutes)"
	@echo "make test-xla   run the tests on several simulated devices"
	@echo "make test-aot   run the tests that drive the TPU compiler (no TPU needed)"
	@echo "make test-slow  run the tests of large shapes and whole runs"
	@echo "make soak       interrupt an hour of the quickstart in every way and compare the outcome (2.5 hours)"
	@echo "make lint       check style"
	@echo "make notebooks  run the notebooks, and keep what they show (about 3 minutes)"
	@echo "make docs       build the reference of the public API, into build/docs"

pretrain: $(READY)
	$(BIN)/accelerate launch recipes/pretrain.py --config recipes/configs/quickstart.yaml

finetune: $(READY)
	@[ -e runs/quickstart/export/config.json ] || $(MAKE) pretrain
	$(BIN)/python recipes/docstrings.py runs/docstrings
	$(BIN)/accelerate launch recipes/finetune.py --config recipes/configs/gemma-tiny-lora-cpu.yaml

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-xla: $(READY)
	$(BIN)/python -m pytest -m xla

test-aot: $(READY)
	$(BIN)/python -m pytest -m aot

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

soak: $(READY)
	$(BIN)/python benchmarks/soak.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: $(READY)
	$(BIN)/python notebooks/execute.py

docs: $(READY)
	$(BIN)/python docs/reference.py build/docs

# .venv/.begun marks an environment that this file made. One that was begun but never got ready is made anew: what an
# interrupted installation left behind looks installed but is not. An environment made by somebody else is only added to.
$(READY): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "error: $$($(PYTHON) --version) at '$(PYTHON)'; torch_xla 2.9 needs Python 3.11 to 3.13." \
	       "Name one: make PYTHON=python3.11" >&2; exit 2; }
	@if [ -e .venv/.begun ] && ! { [ -e $(READY) ] && $(BIN)/python -c ''; }; then \
	  echo "Repairing .venv, whose installation was interrupted"; rm -rf .venv; fi
	@if ! [ -x $(BIN)/python ]; then mkdir -p .venv && touch .venv/.begun && $(PYTHON) -m venv .venv || { \
	  echo "error: no virtual environment could be made with '$(PYTHON)'; on Debian: apt install python3-venv" >&2; \
	  rm -rf .venv; exit 2; }; fi
	@echo "Installing into .venv: about 7 GB on disk, a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --timeout 120 -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
