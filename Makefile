# Every target installs first, into .venv; a second time that costs nothing.

BIN := .venv/bin
READY := .venv/ready

.PHONY: help setup demo test lint docs acceptance soak clean example-classify example-finetune example-fill example-images example-translate

help:  ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 20

setup: $(READY)  ## install into .venv, at the versions of constraints.txt; TORCH=cpu, cuda or site says which torch

# make setup TORCH=cpu|cuda|site: made anew where it was made for another.
ifneq ($(TORCH),)
ifneq ($(TORCH),$(shell cat .venv/torch 2>/dev/null))
.PHONY: $(READY)
endif
endif

$(READY): pyproject.toml constraints.txt tools/setup.sh
	@tools/setup.sh
	@touch $(READY)

demo: $(READY)  ## everything once, on real text: data, training, a kill, a resume, evaluation, a sample, a report
	@$(BIN)/python tools/demo.py demo

example-classify: $(READY)  ## which part of the kernel's documentation a passage is from, by few labels; see examples/classify/README.md
	@$(BIN)/python -m examples.classify.classify build/example-classify

example-finetune: $(READY)  ## LoRA on a small chat model, before and after; see examples/finetune/README.md
	@$(BIN)/python -m examples.finetune.finetune build/example-finetune

example-fill: $(READY)  ## a small model fills gaps in Python functions; see examples/fill/README.md
	@$(BIN)/python -m examples.fill.fill build/example-fill

example-images: $(READY)  ## a small vision transformer on Fashion-MNIST; see examples/images/README.md
	@$(BIN)/python -m examples.images.images build/example-images

example-translate: $(READY)  ## French into English with few pairs: what pretraining on text gains; see examples/translate/README.md
	@$(BIN)/python -m examples.translate.translate build/example-translate

test: $(READY)  ## the tests that are run before every change
	$(BIN)/pytest -m "not slow"

lint: $(READY)  ## what CI checks of the code itself
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/docs  ## the documentation as a site in build/site; a broken link or anchor fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Under TORCH=site the constraints are the site's, which keep its torch.
.venv/docs: $(READY)
	@$(BIN)/pip install -qq -c $(firstword $(wildcard .venv/constraints.txt) constraints.txt) -e '.[docs]'
	@touch $@

acceptance: $(READY)  ## every long suite in full (hours), and the soak; see docs/proofs.md
	MEGATRAIN_ACCEPTANCE=1 $(BIN)/pytest
	$(BIN)/python -m tests.faults.soak

soak: $(READY)  ## one run, hit by faults of every kind for 20 minutes: is anything lost?
	$(BIN)/python -m tests.faults.soak

clean:  ## remove what make has made, and nothing else: .venv, demo/, caches
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
