# `make demo` and `make test` do all set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV ?= .venv-vllm
CLIENTS_VENV ?= .venv-clients
INFRA_VENV ?= .venv-infra

.PHONY: dashboard demo local test test-slow test-vllm test-vllm-slow test-clients check-infra search check format lock clean

# The whole service on this machine, with a local S3 server: `make local ARGS="model=…"`.
local: $(READY)
	$(BIN)/python -m infra.local.up $(ARGS)

demo: $(READY)
	$(BIN)/python jobs/caption_corpus.py

# Coverage is measured where no model runs: with models it would cost half of their time again.
MEASURED := tests/cluster tests/integration tests/sppruner/selectors \
	tests/sppruner/test_spec.py tests/sppruner/test_types.py tests/sppruner/test_vqa.py

test: $(READY)
	$(BIN)/python -m coverage run -m pytest $(MEASURED)
	$(BIN)/python .ci/coverage.py
	$(BIN)/python -m pytest $(MEASURED:%=--ignore=%)

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu"

# The plugin for vLLM, in an environment of its own: vLLM pins other versions than the lock file.
test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest -W default tests/sppruner/integrations/vllm

test-vllm-slow: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest -W default -m "slow and not gpu" tests/sppruner/integrations/vllm

# Client libraries against the endpoint, in an environment of their own.
test-clients: $(READY) $(CLIENTS_VENV)/.ready
	SPPRUNER_PYTHON=$(abspath $(BIN)/python) $(CLIENTS_VENV)/bin/python -m pytest -W default \
		-p no:cacheprovider --confcutdir=tests/clients tests/clients

# Images, manifests, policies and alerts, each by its own tool or schema.
check-infra: $(INFRA_VENV)/.ready
	PATH=$(abspath $(INFRA_VENV)/bin):$$PATH $(INFRA_VENV)/bin/python -W ignore infra/check.py
	$(INFRA_VENV)/bin/python -m pytest -W ignore -p no:cacheprovider --noconftest tests/infra/test_check.py

# Generated inputs that no run had before; a failure prints how to replay it.
search: $(READY)
	$(BIN)/python -m pytest --hypothesis-profile=search -m "hypothesis and not gpu"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dashboard: $(READY)
	$(BIN)/python infra/monitoring/dashboard.py > infra/monitoring/dashboard.json

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

# Writes what is installed now; torch's local build tag is dropped so that a GPU machine gets CUDA.
lock: $(READY)
	$(BIN)/python -m pip freeze --exclude-editable | grep -v -i '^\(nvidia\|triton\|cuda\)' \
		| sed 's/^\(torch==[0-9.]*\)+.*/\1/' > requirements.lock

clean:
	rm -rf $(VENV) out

$(CLIENTS_VENV)/.ready: requirements-clients.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-clients.txt
	touch $@

$(INFRA_VENV)/.ready: requirements-infra.txt
	$(PYTHON) -m venv $(INFRA_VENV)
	$(INFRA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-infra.txt
	touch $@

$(VLLM_VENV)/.ready: requirements-vllm.txt .ci/vllm_cpu/sitecustomize.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	cp .ci/vllm_cpu/sitecustomize.py $(VLLM_VENV)/lib/python3*/site-packages/
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
