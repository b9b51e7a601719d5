# `make` says what there is. Everything runs in .venv, which any target makes when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.environment
BUILT := $(VENV)/.built
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Images of containers often set this. Each of the many processes that tests start would then compile torch again: the
# import takes 5 s and not 2.8.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-torch lint format bench bench-train bench-cpu gpu-check doctor wheel docs try-install oldest-headers sanitize two-unwinders fuzz mutants clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(BUILT)  ## only make the environment and build (every other target does so too)

demo: $(BUILT)  ## the main job: ticket search, adversarial training and controls on real digits (3 minutes after set-up)
	$(BIN)/python -m sparse_adv demo

test: $(BUILT)  ## run the tests, as many at a time as there are cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-torch:  ## run the tests under another torch: VERSION=2.10.0 (and PYTHON=python3.12, WHEEL=a build from elsewhere)
	@test -n "$(VERSION)" || { echo "which torch? make test-torch VERSION=2.10.0"; exit 2; }
	PYTHON=$(PYTHON) .ci/test_torch $(VERSION) $(WHEEL)

lint: $(BUILT)  ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name "*.cpp" -o -name "*.h" -o -name "*.cu")
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BUILT)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(find csrc tests -name "*.cpp" -o -name "*.h" -o -name "*.cu")

bench: $(BUILT)  ## measure every op and its rivals with pytest-benchmark; ARGS="-k pgd_step" chooses some
	$(BIN)/python -m pytest benchmarks -q --benchmark-enable --benchmark-max-time=0.3 \
	  --benchmark-columns=median,iqr,rounds $(ARGS)

bench-train: $(BUILT)  ## whole training updates on this CPU against careful dense PyTorch (20 to 40 minutes; ARGS="--rows 0,5 --no-compile" for less)
	$(BIN)/python benchmarks/bench_training.py $(ARGS)

bench-cpu: $(BUILT)  ## the table of CPU kernels: ratios to dense and their bounds here (5 minutes; ARGS="--out FILE.csv")
	$(BIN)/python benchmarks/bench_masked_conv2d.py $(ARGS)

gpu-check:  ## on a machine with a GPU and a CUDA torch: build, prove and measure there (OUT=build/gpu_check)
	PYTHON=$(PYTHON) benchmarks/gpu_check.sh $(or $(OUT),build/gpu_check)

doctor: $(BUILT)  ## check the installation
	$(BIN)/python -m sparse_adv doctor

docs: $(BUILT)  ## build the documentation in build/site, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

wheel: $(BUILT)  ## build dist/*.tar.gz and dist/*.whl, the wheel for this Python and every torch from 2.10 on
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist --wheel

try-install: wheel  ## take the README's steps of installing in a fresh environment, with that archive and that wheel
	.ci/install $(BIN)/python build/install

oldest-headers: $(BUILT)  ## compile against the headers of the oldest torch, which the first call fetches (1 GB)
	.ci/oldest_torch_headers $(BIN)/python

sanitize: $(BUILT)  ## run the tests of the ops under AddressSanitizer and UndefinedBehaviorSanitizer
	.ci/sanitize $(BIN)/python build/sanitize

two-unwinders: $(BUILT)  ## run the tests of refusals on a build whose op libraries have an unwinder of their own
	.ci/two_unwinders $(BIN)/python build/two_unwinders

fuzz: $(BUILT)  ## random op calls, tampered patterns and damaged files: MINUTES=5 SEED=7; CASE=ops:7000123 repeats one
	PYTHONPATH=tests $(BIN)/python -m fuzz --minutes $(or $(MINUTES),1) --seed $(or $(SEED),0) $(if $(CASE),--case $(CASE))

mutants: $(BUILT)  ## plant mistakes and see whether the tests notice: N=10 SEED=1 FILES=sparse_adv/training
	$(BIN)/python .ci/mutants --n $(or $(N),10) --seed $(or $(SEED),0) --files $(or $(FILES),sparse_adv)

clean:  ## remove what was built and the environment
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	rm -f sparse_adv/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes before the build, which needs it; see "Installing" in README.md.
$(ENVIRONMENT): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile -c constraints.txt torch setuptools cmake ninja pybind11
	@touch $@

$(BUILT): $(ENVIRONMENT) $(NATIVE)
	$(PIP) install --quiet --no-compile --no-build-isolation -c constraints.txt -e ".[data,demo,test,docs,dev]"
	@touch $@
