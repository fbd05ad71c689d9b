# Needs Python 3.10 or later with pip and venv; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := -m pip install --disable-pip-version-check --progress-bar off --quiet -c constraints.txt

# $(call set_up,python,folder). PyTorch first: pip keeps what it downloads until all of it is installed, and PyTorch's
# gigabytes of wheels are gone before the rest comes.
define set_up
@test -d $(2) || $(1) -c 'import shutil; free = shutil.disk_usage(".").free / 1e9; \
    free < 9 and print(f"WARNING: {free:.1f} GB of disk are free; $(2) may take 9 while it is made")'
$(1) -m venv $(2)
@echo "1 of 2: PyTorch into $(2), gigabytes and one to some minutes"
$(2)/bin/python $(PIP_INSTALL) torch torchvision
@echo "2 of 2: transformers and everything else, a minute or more"
$(2)/bin/python $(PIP_INSTALL) -e ".[test]"
endef

# Threads that spin while they wait slow each other down where other programs use the cores too.
export OMP_WAIT_POLICY := passive

.PHONY: app demo paper test test-oldest test-upstream test-vllm check aot clean

demo: .venv/installed  ## ask the small checkpoint about drawn videos
	$(BIN)/python demo/run_demo.py $(ARGS)

app: .venv/installed  ## a web page to ask videos, with the small checkpoint and drawn videos
	$(BIN)/python app.py $(ARGS)

paper: .venv/installed  ## the paper's comparisons and findings on the small checkpoints; half an hour, writes docs/paper.md
	$(BIN)/python -m analysis.paper $(ARGS)

test: .venv/installed check  ## all tests that need no GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Slow: gigabytes to install, and the suite once more. constraints.txt has the versions.
PYTHON310 ?= python3.10
OLDEST ?= .venv-oldest
TESTS ?= tests

test-oldest: $(OLDEST)/installed  ## the same tests with the oldest supported Python, transformers and torch
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(TESTS)

$(OLDEST)/installed: pyproject.toml constraints.txt
	$(PYTHON310) -c 'import sys; assert sys.version_info[:2] == (3, 10), f"PYTHON310 is Python {sys.version}"'
	$(call set_up,$(PYTHON310),$(OLDEST))
	touch $@

test-upstream: .venv/installed  ## transformers' own tests of models, on VideoNSA and on Qwen2.5-VL
	$(BIN)/python $(PIP_INSTALL) parameterized
	$(BIN)/python tools/run_upstream_tests.py $(ARGS)

# Slow: 3 GB to install; skipped, and said so, where they cannot be had. The reference is what transformers answers.
VLLM ?= .venv-vllm
VLLM_TESTS ?= vllm_plugin/tests

test-vllm: .venv/installed  ## the vLLM plug-in against transformers, in an environment of its own
	@if test -e $(VLLM)/installed || vllm_plugin/tests/make_environment.sh $(VLLM); then \
	    set -ex; \
	    $(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .; \
	    VIDEONSA_REFERENCE_PYTHON=$(BIN)/python $(VLLM)/bin/python -m pytest $(VLLM_TESTS); \
	elif test $$? = 3; then echo "test-vllm: SKIPPED"; \
	else exit 1; fi

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml constraints.txt
	$(call set_up,$(PYTHON),.venv)
	touch $@

aot: .venv/installed  ## compile every Triton kernel for five targets, no GPU needed; writes docs/aot.md
	$(BIN)/python tools/aot_report.py

clean:
	rm -rf .venv .venv-oldest .venv-vllm demo/output build *.egg-info
