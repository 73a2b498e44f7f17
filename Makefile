# Ten papers, one front door. `make list` names them; `make train PROJECT=fssm` trains one on this machine.
#
#   make list                                                        the papers: task, time of the default run, main claim
#   make train      PROJECT=fssm [ARGS="model.optimizer.lr=1e-4"]    train on embedded data (ARGS goes to Hydra as it is)
#   make evaluate   PROJECT=fssm CKPT=<our or a published file>      score weights
#   make predict    PROJECT=fssm INPUT=<file or folder> OUTPUT=<path>
#   make reproduce  PROJECT=fssm                                     run the paper's claims, several seeds
#   make benchmark  [PROJECT=fssm]                                   measure kernels and projects beside named peers; of one
#                                                                    project also how a training step's cost grows
#   make report                                                      README tables and report/index.html from the results
#   make test       [PROJECT=fssm]                                   quick tests, up to four at once; make test-all adds the slow ones
#   make test-gpu   [PROJECT=fssm]                                   the tests that need a CUDA device
#   make lint                                                        ruff, import-linter, yamllint
#
# Every target sets up $(VENV) by itself. PYTHON=python3.12 chooses another interpreter, CONSTRAINTS= the newest packages.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PROJECT ?=
ARGS ?=
CKPT ?=
INPUT ?=
OUTPUT ?=

PROJECTS := $(sort $(patsubst projects/%/paper.yaml,%,$(wildcard projects/*/paper.yaml)))
# the modules that measure: those of the kernels and projects, or with PROJECT=<name> that project's own
MEASURED := $(if $(PROJECT),$(wildcard projects/$(PROJECT)/benchmark.py),$(sort $(wildcard shared/kernels/*/benchmark.py projects/*/benchmark.py)))
BENCHMARKS := $(subst /,.,$(MEASURED:.py=))
RUN := $(VENV)/bin/python -m
comma := ,
empty :=
space := $(empty) $(empty)

.PHONY: help list train evaluate predict reproduce benchmark report test test-all test-gpu lint project

help:
	@sed -n '/^\#/!q;s/^\# \{0,1\}//p' Makefile

list:
	@$(PYTHON) -m shared.catalogue

# a path as a quoted Hydra override, whatever characters it has
override = $(if $(2),'$(1)="$(subst ','\'',$(2))"')

train: project $(VENV)/.installed-$(PROJECT)
	$(RUN) projects.$(PROJECT).train $(ARGS)

evaluate: project $(VENV)/.installed-$(PROJECT)
	$(RUN) projects.$(PROJECT).evaluate $(call override,ckpt_path,$(CKPT)) $(ARGS)

predict: project $(VENV)/.installed-$(PROJECT)
	$(RUN) projects.$(PROJECT).predict $(call override,input,$(INPUT)) $(call override,output,$(OUTPUT)) $(call override,ckpt_path,$(CKPT)) $(ARGS)

reproduce: project $(VENV)/.installed-$(PROJECT)
	$(RUN) shared.reproduce $(PROJECT) $(ARGS)

benchmark: $(if $(PROJECT),project) $(VENV)/.installed-benchmark
	@set -e; for b in $(BENCHMARKS); do echo "$(RUN) $$b $(ARGS)"; $(RUN) $$b $(ARGS); done
	$(if $(PROJECT),$(RUN) shared.growth $(PROJECT))

report: $(VENV)/.installed-base
	$(RUN) shared.report $(ARGS)

test: $(if $(PROJECT),project) $(VENV)/.installed-test
	$(RUN) pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow and not gpu" $(if $(PROJECT),projects/$(PROJECT)) $(ARGS)

test-all: $(if $(PROJECT),project) $(VENV)/.installed-test
	$(RUN) pytest -n auto --maxprocesses 4 --dist loadfile -m "not gpu" $(if $(PROJECT),projects/$(PROJECT)) $(ARGS)

test-gpu: $(if $(PROJECT),project) $(VENV)/.installed-test $(VENV)/.installed-cuda
	$(RUN) pytest -m gpu $(if $(PROJECT),projects/$(PROJECT)) $(ARGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/yamllint --strict .

project:
ifeq ($(filter $(PROJECT),$(PROJECTS)),)
	@echo "$(if $(PROJECT),no project '$(PROJECT)'; ,)say PROJECT=<name>, one of:" >&2; $(MAKE) -s list >&2; exit 2
endif

# One stamp per set of packages. `base` and `test` hold every project's needs, a project's stamp only its own.
# Names of extras have hyphens in a package's metadata, whatever pyproject.toml writes; older pips look for those alone.
extras-base := $(subst $(space),$(comma),$(PROJECTS))
extras-test := $(extras-base),test
extras-launchers := launchers
extras-benchmark := $(extras-base),benchmark
extras-cuda := cuda

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS)
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[$(subst _,-,$(or $(extras-$*),$*))]"
	@touch $@
