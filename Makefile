# make help    these lines
# make env     the environment in .venv; every other target makes it first
# make demo    a fresh machine to a Pareto plot of trained models, in a quarter of an hour, without an account
# make test    a fresh machine to the whole test suite: format, lint, types, tests
# make lint    format, lint and types alone
# make pytest  the tests alone
# make bench   a training step, the loader and decoding against baselines, on the CPU; a quiet machine and an hour
# make gpu     measurements on a GPU, part by part: GPU="parts=train_1b,decode minutes=9"; says so where there is none
# make gpu-code  every layout as code for an H100, without one; half an hour, and 7 GB for torch 2.11 with CUDA, or an
#                environment that has it: OLDEST=FOLDER/bin/python; some of it: GPU_CODE="-k cla2"
# make torch211  the tests of models, documents and the loss on torch 2.11, the oldest supported; the same environment
# make faults  a run against every signal and every damaged file, and what came of it
# make clean   deletes the environment and the caches of the tools, no run and no data
#
PYTHON ?= python3
BIN := .venv/bin
# Without bytecode every process compiles its packages anew.
unexport PYTHONDONTWRITEBYTECODE
DEMO_ARCHS ?= mha,gqa2,mqa,cla2,mixattention,block,bct
DEMO_RUNS := runs/demo-$(shell date +%Y-%m-%d_%H-%M-%S)

.PHONY: help env demo test pytest bench gpu gpu-code torch211 faults lint clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/s/^# \{0,1\}//p' Makefile

# The pip that comes with Python 3.11 takes twice as long to resolve as a new one, but does where there is no other.
#
# pip takes torch from the package index, which on Linux is the CUDA build; for the small CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make env
env: $(BIN)/.ready
$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	-$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# Text and recall at the same time, a thread each; multi-head attention with two more seeds, whose range is the band of
# the picture.
TRAIN_DEMO = OMP_NUM_THREADS=1 $(BIN)/python train/pretrain.py -m trainer.progress=false
DEMO_TEXT = $(TRAIN_DEMO) +size=tiny tokens=200_000 'evals={tasks: [perplexity]}' hydra.sweep.dir=$(DEMO_RUNS)/text
DEMO_RECALL = $(TRAIN_DEMO) +experiment=recall hydra.sweep.dir=$(DEMO_RUNS)/recall
demo: env
	$(MAKE) --jobs=2 demo-text demo-recall DEMO_RUNS=$(DEMO_RUNS)
	$(BIN)/python eval/pareto.py $(DEMO_RUNS) y=perplexity/ppl,recall/gap/accuracy baseline=mha

.PHONY: demo-text demo-recall
demo-text:
	$(DEMO_TEXT) +arch=$(DEMO_ARCHS)
	$(DEMO_TEXT) +arch=mha seed=1,2

demo-recall:
	$(DEMO_RECALL) +arch=$(DEMO_ARCHS)
	$(DEMO_RECALL) +arch=mha seed=1,2

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: env
	$(MAKE) --jobs=2 lint pytest

# Three processes for two cores: some tests wait.
pytest: env
	$(BIN)/python -m pytest -n 3 --dist worksteal

# Peers that are not installed are skipped. litgpt's own requirements contradict constraints.txt, so that it comes bare:
#   .venv/bin/pip install --no-deps litgpt psutil
bench: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python train/benchmarks/cpu.py +arch=gqa4 +size=20m $(BENCH)
	$(BIN)/python train/benchmarks/decode_study.py size=20m $(DECODE)

faults: env
	$(BIN)/python train/benchmarks/faults.py

gpu: env
	$(BIN)/python train/benchmarks/gpu_suite.py $(GPU)

# From PyPI, whose torch for Linux is the CUDA build. OLDEST= names the Python of an environment that has all of it.
OLDEST ?= .venv-torch211/bin/python
.venv-torch211/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-torch211
	grep -v ^torch== constraints.txt > .venv-torch211/constraints.txt
	.venv-torch211/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c .venv-torch211/constraints.txt torch===2.11.0 -e ".[dev,gpu-code]"
	touch $@

ifeq ($(OLDEST),.venv-torch211/bin/python)
gpu-code torch211: .venv-torch211/.ready
endif

gpu-code:
	$(OLDEST) -m pytest tests/test_train_gpu_code.py $(GPU_CODE)

torch211:
	$(OLDEST) -m pytest -n 2 tests/test_arch_*.py tests/test_train_loss.py

clean:
	rm -rf .venv .venv-torch211 .mypy_cache .pytest_cache .ruff_cache
