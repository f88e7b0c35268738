# Every target is one call of a stage; `make` alone lists them in the order of use.
PYTHON ?= python3
LAUNCH ?= python
ARGS ?=
MAKEFLAGS += --no-print-directory

VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"
needed = $(or $(RECIPE),$(error RECIPE= is missing, as in: make $@ RECIPE=recipes/mini98.yaml))
recipe = --recipe "$(needed)"
given = $(if $($(2)),--$(1) "$($(2))")
STAGE = $(VENV) $(LAUNCH) -m

.PHONY: help setup demo test lint type check data pretrain embed evaluate finetune \
	label-request import-labels pseudo-label submit audit rehearse compare-methods compare-requests \
	compare-pseudo-labels compare-finetunings compare-entries bench

help: ## List what can be made, in the order of use
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-22s %s\n", $$1, $$2}' Makefile

setup: .venv/.installed ## Make .venv with everything that is needed (PYTHON=python3)

demo: .venv/.installed ## Make a contest, enter it, print the scoreboard (SOURCE=image folder)
	$(VENV) python -m stages.demo $(call given,source,SOURCE) $(ARGS)

test: .venv/.installed ## Run the default test suite
	$(VENV) OMP_NUM_THREADS=1 python -m pytest -n 2 $(ARGS)

lint: .venv/.installed ## Check style and format with ruff
	$(VENV) ruff check . && $(VENV) ruff format --check .

type: .venv/.installed ## Check types with mypy --strict
	$(VENV) mypy --strict

check: lint type test ## All three

data: .venv/.installed ## Pack a contest's images (ROOT=folder CONTEST=name, or RECIPE=)
	$(VENV) python -m stages.prepare $(call given,recipe,RECIPE) $(call given,data.root,ROOT) $(call given,data.contest,CONTEST) $(ARGS)

pretrain: .venv/.installed ## Train an encoder without labels (LAUNCH="accelerate launch" on several GPUs)
	$(STAGE) stages.pretrain $(recipe) $(ARGS)

embed: .venv/.installed ## Embed every split (LAUNCH=)
	$(STAGE) stages.embed $(recipe) $(ARGS)

evaluate: .venv/.installed ## Judge the embeddings: kNN, linear, nearest neighbors
	$(VENV) python -m stages.evaluate $(recipe) $(ARGS)

finetune: .venv/.installed ## Train a classifier on every label there is (LAUNCH=)
	$(STAGE) stages.finetune $(recipe) $(ARGS)

label-request: .venv/.installed ## Choose the images to ask labels for (FORMAT=label-studio)
	$(VENV) python -m stages.label_request $(recipe) $(call given,format,FORMAT) $(ARGS)

import-labels: .venv/.installed ## Check and keep the answer (ANSWER=label_NN.pt, or Label Studio's export.json)
	$(VENV) python -m stages.import_labels $(recipe) $(call given,answer,ANSWER) $(ARGS)

pseudo-label: .venv/.installed ## Label what the classifier is sure of (LAUNCH=)
	$(STAGE) stages.pseudo_label $(recipe) $(ARGS)

submit: .venv/.installed ## Write and check the submission
	$(VENV) python -m stages.submit $(recipe) $(ARGS)

audit: .venv/.installed ## Show images that look the same and labels that look wrong
	$(VENV) python -m stages.audit $(recipe) $(ARGS)

rehearse: .venv/.installed ## Make a contest of classified images (SOURCE=folder, cifar10, stl10, … OUT=contests/NAME)
	$(VENV) python -m stages.rehearse make --source "$(or $(SOURCE),$(error SOURCE= is missing, as in: make rehearse SOURCE=cifar10))" --out "$(or $(OUT),contests/$(notdir $(SOURCE:/=)))" $(ARGS)

compare-methods: .venv/.installed ## Compare pretraining methods: a table in docs/methods.md (RECIPES="recipes/mini98_*.yaml")
	$(VENV) python -m stages.compare_methods $(RECIPES) $(ARGS)

compare-requests: .venv/.installed ## Compare label-request strategies on a rehearsal: a table in docs/labels.md
	$(VENV) python -m stages.compare_requests $(recipe) $(ARGS)

compare-pseudo-labels: .venv/.installed ## Compare who predicts pseudo-labels on a rehearsal: a table in docs/labels.md
	$(VENV) python -m stages.compare_pseudo_labels $(recipe) $(ARGS)

compare-finetunings: .venv/.installed ## Compare ways of fine-tuning from the encoder of RECIPE= (RECIPES="recipes/finetunings/plain.yaml …", the control first)
	$(VENV) python -m stages.compare_entries --base "$(needed)" --encoder "$(basename $(notdir $(RECIPE)))" $(RECIPES) $(ARGS)

compare-entries: .venv/.installed ## Compare whole entries, and a peer (RECIPES="CONTROL OTHER …" ARGS='--peer "COMMAND"')
	$(VENV) python -m stages.compare_entries $(call given,base,RECIPE) $(RECIPES) $(ARGS)

bench: .venv/.installed ## Measure against the peers (NAME=one benchmark)
	$(VENV) python -m benchmarks $(NAME) $(ARGS)

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed and $(PYTHON) is %d.%d; name another with PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
