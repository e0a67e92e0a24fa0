# `make demo` and `make test` do all set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow search check format lock clean

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

# Generated inputs that no run had before; a failure prints how to replay it.
search: $(READY)
	$(BIN)/python -m pytest --hypothesis-profile=search -m "hypothesis and not gpu"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
