# make train   train a small sparse language model   ARGS="--help" shows its options
# make test    run the tests                         ARGS="-k topk" is given to pytest
# make lint    ruff and pyright
# make clean   remove the environments and caches
#
# PYTHON makes the environment, VENV is its folder. An environment that is there is
# used as it is: give another PYTHON another VENV, or run `make clean` first.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# Workers of the test run; more than a few only cost memory.
TEST_WORKERS ?= -n logical --maxprocesses=4 --dist=worksteal

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check

.PHONY: train test lint clean

train: $(VENV)/.installed-examples
	$(bin)/python examples/train_lm.py $(ARGS)

test: $(VENV)/.installed-test
	$(bin)/python -m pytest $(TEST_WORKERS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/pyright --pythonpath $(bin)/python

clean:
	rm -rf .venv .venv-newest build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# One stamp per extra: installed again only when pyproject.toml changes. Of the modules
# installed few are imported, and only those need to be compiled.
$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	$(pip) install --quiet --no-compile -e ".[$*]"
	@touch $@

# Some systems ship Python without ensurepip; there pip itself fills the environment.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys' || { \
	  echo "error: '$(PYTHON)' does not run; give one by make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: sparsejax needs Python >= 3.11; '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1). Give another by make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(bin)/python install --quiet pip; }
	@touch $@

.PRECIOUS: $(VENV)/.installed-%
