# Everything happens in .venv; PYTHON is the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# gpu-check builds in the Python that already holds torch with CUDA; it needs no network.
GPU_PYTHON ?= $(PYTHON)
GPU_VENV := .venv-gpu

SANITIZE_VENV := .venv-sanitize

# A bench that takes longer is interrupted, and that is no failure.
bounded = timeout --signal=INT --kill-after=20 $(1) $(GPU_VENV)/bin/python
passed = || test $$? -eq 124

SOURCES := $(shell find csrc pymcip triton_kernels -type f ! -name '*.pyc' 2>/dev/null) \
           CMakeLists.txt pyproject.toml

.PHONY: help setup lint test sanitize demo bench gpu-check clean

help:
	@echo "make setup      .venv with the package, installed as a wheel, and all it needs"
	@echo "make lint       ruff and mypy"
	@echo "make test       lint, then the whole test suite against the installed wheel"
	@echo "make sanitize   the tests of top-k and ranks against a build with AddressSanitizer and UBSan (GCC)"
	@echo "make demo       run 'pymcip demo'"
	@echo "make bench      time the ops against their rivals on the CPU"
	@echo "make gpu-check  build with CUDA, run the GPU tests and benches (GPU_PYTHON=python with torch)"
	@echo "make clean      remove what the above made, .venv too"

setup: $(VENV)/installed

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "pymcip needs Python >= 3.10; $(PYTHON) is $$($(PYTHON) --version 2>&1). Choose another:" \
	       "make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) can't make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip build
	@touch $@

dist/built: $(VENV)/created $(SOURCES)
	rm -f dist/*.whl
	$(BIN)/python -m build --wheel --outdir dist
	@touch $@

# A dependency is installed once; after that only the wheel itself is exchanged.
$(VENV)/installed: dist/built
	$(BIN)/python -m pip install --quiet "$$(ls dist/*.whl)[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	@cd $(VENV) && bin/python -c 'import torch, torchvision, open_clip, pymcip._core' || { \
	  echo "The packages installed into $(VENV) don't work together (see the error above). If it names" \
	       "torchvision::nms, pip took torch and torchvision from different builds: look for" \
	       "find-links or extra-index-url in 'pip config list', then 'make clean' and try again" \
	       "without them."; exit 1; }
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

# The extension anew, in an environment of its own that sees the packages of $(VENV). Their code is
# not instrumented, and Python itself leaks: so the sanitizers' libraries are loaded first, and leaks
# are not looked for.
sanitize: setup
	$(BIN)/python -m venv $(SANITIZE_VENV)
	@$(BIN)/python -c 'import site; print(*site.getsitepackages(), sep="\n")' \
	  > $$($(SANITIZE_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/parent.pth
	$(SANITIZE_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall . \
	  -C cmake.define.PYMCIP_SANITIZE=ON -C cmake.define.PYMCIP_CUDA=OFF -C build-dir=build/sanitize
	@# Not from the root: see gpu-check. Their reports go past Python's sys.stderr: --capture=sys.
	cd $(SANITIZE_VENV) && \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYMCIP_EXAMPLES=0.2 \
	  bin/python -m pytest -c ../pyproject.toml --rootdir .. --capture=sys \
	  -k "not torch and not faiss" ../tests/test_topk.py ../tests/test_ranks.py

demo: setup
	$(BIN)/pymcip demo

bench: setup
	$(BIN)/python bench/bench_margin_softmax.py
	$(BIN)/python bench/bench_topk.py
	$(BIN)/python bench/bench_metrics.py
	$(BIN)/python bench/bench_train.py
	$(BIN)/python bench/bench_depthwise.py

gpu-check:
	@$(GPU_PYTHON) -c 'import open_clip, pyarrow, pybind11, pytest, hypothesis, scikit_build_core, torch' \
	|| { echo "gpu-check installs nothing but pymcip, and $(GPU_PYTHON) lacks what the error above names;" \
	  "install it there, or name another: make gpu-check GPU_PYTHON=/path/to/python3"; exit 2; }
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 2)' || { \
	  echo "gpu-check needs a CUDA device, and torch sees none here: nothing was checked."; exit 2; }
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	@# GPU_PYTHON may be a virtual environment itself, which --system-site-packages would not show.
	@$(GPU_PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' \
	  > $$($(GPU_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/parent.pth
	$(GPU_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	$(GPU_VENV)/bin/pymcip env
	@# Not from the root: "python -m pytest" would import the source folder instead.
	@# Timing tile sizes would compile each kernel several times; the bench does that.
	cd $(GPU_VENV) && PYMCIP_TUNE=0 bin/python -m pytest -c ../pyproject.toml --rootdir .. -m gpu \
	  $$(grep -l 'mark\.gpu' ../tests/*.py)
	@# The CUDA top-k ranks its self-check under the sanitizer; each allocation is one of the device's.
	cd $(GPU_VENV) && for tool in memcheck synccheck; do \
	  if command -v compute-sanitizer > /dev/null; then \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 45 compute-sanitizer --tool $$tool --error-exitcode 3 \
	      bin/python -c 'from pymcip.ops.topk_cuda import probe_cuda as p; r = p(); assert not r, r' \
	      $(passed) || exit 1; \
	  else echo "compute-sanitizer is not in the PATH: $$tool is left out"; fi; done
	@# At most 6 minutes; the first two keep the time themselves, and when interrupted what they have.
	$(call bounded,150) bench/bench_margin_softmax.py --device cuda --store --seconds 115 $(passed)
	$(call bounded,130) bench/bench_topk.py --device cuda --store --seconds 100 $(passed)
	$(call bounded,30) bench/bench_metrics.py --device cuda --cases gpr1200 --store $(passed)
	$(call bounded,50) bench/bench_train.py --device cuda --store $(passed)

clean:
	rm -rf $(VENV) $(GPU_VENV) $(SANITIZE_VENV) build dist
