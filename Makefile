# make run: install, then answer a few prompts with the embedded model.   make serve: the same as a server.   make check: install, then lint, types and the tests of tests/check.txt.   make test: the same with all tests.
PYTHON ?= python3
WORKERS ?= 3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py constraints.txt

NPU := $(VENV)/npu
NPU_SOURCES := $(addprefix tests/npu/,requirements.txt cann_stub/build.py cann_stub/runtime.c)

.PHONY: run serve check test test-npu lint checked-tests cpu-kernels browser clean

run: $(VENV)/.installed
	$(BIN)/python example.py $(ARGS)

serve: $(VENV)/.installed-serve
	$(BIN)/nanovllm serve $(ARGS)

# One worker more than cores, since some tests wait. Workers take whole files, the longest first (tests/conftest.py).
XDIST := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Without mypy's cache the types take as long as the tests, so they run beside them.
check: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory --jobs=2 lint checked-tests

checked-tests: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q $(XDIST) $$(cat tests/check.txt) $(ARGS)

test: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory --jobs=2 lint cpu-kernels
	$(BIN)/python -m pytest $(XDIST) $(ARGS)
	@problem="$$($(BIN)/python tests/npu/run.py --problem)"; if [ -z "$$problem" ]; then $(MAKE) test-npu; else echo "$$problem"; fi

# once, before each worker builds its own
cpu-kernels: $(VENV)/.installed-test
	$(BIN)/python -m tests.kernels.cpu_libraries

# torch_npu without an NPU: the real package over libraries with the names of CANN's (tests/npu/run.py)
test-npu: $(NPU)/.installed
	$(BIN)/python tests/npu/run.py $(NPU) $(XDIST) $(ARGS)

# what the tests of the page drive, on Debian as root; without it they are left out, and the summary says so
browser:
	command -v chromium || (apt-get update --quiet=2 && apt-get install --yes --quiet=2 --no-install-recommends chromium)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[vision]'
	touch $@

$(VENV)/.installed-serve: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,vision]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-test: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-serve

$(NPU)/.installed: $(VENV)/.installed-test $(NPU_SOURCES)
	rm -rf $(NPU)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(NPU)/site -r tests/npu/requirements.txt
	$(BIN)/python tests/npu/cann_stub/build.py $(NPU)/site $(NPU)/lib
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
