# Everything happens in .venv; PYTHON is the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# gpu-check builds in the Python that already holds torch with CUDA; it needs no network. What that
# Python lacks comes in wheels. Left out: quack-kernels and Liger's kernels for Hopper, which need
# nvidia-cutlass-dsl (92 MB).
GPU_PYTHON ?= $(PYTHON)
GPU_PYTHON_VERSION ?= 3.12
GPU_WHEELS ?= gpu-wheels
GPU_PACKAGES ?= open_clip_torch ftfy wcwidth "webdataset<=0.2.86" braceexpand \
  "scikit-build-core>=1.0" pathspec packaging pytest-timeout pytest-xdist execnet \
  cut-cross-entropy liger-kernel siglip-kernel

SANITIZE_VENV := .venv-sanitize

SOURCES := $(shell find csrc pymcip triton_kernels -type f ! -name '*.pyc' 2>/dev/null) \
           CMakeLists.txt pyproject.toml

.PHONY: help setup lint test sanitize demo docs bench gpu-wheels gpu-check gpu-check-rehearsal clean

help:
	@echo "make setup      .venv with the package, installed as a wheel, and all it needs"
	@echo "make lint       ruff and mypy"
	@echo "make test       lint, then the whole test suite against the installed wheel"
	@echo "make sanitize   the tests of top-k and ranks against a build with AddressSanitizer and UBSan (GCC)"
	@echo "make demo       run 'pymcip demo'"
	@echo "make docs       the pages of docs/ as a web site in build/site; warnings are errors"
	@echo "make bench      time the ops against their rivals on the CPU"
	@echo "make gpu-wheels what gpu-check may lack on a machine without a network, into gpu-wheels/"
	@echo "make gpu-check  build with CUDA, run the GPU tests and benches (GPU_PYTHON=python with torch)"
	@echo "make gpu-check-rehearsal   the same steps with tiny cases on the CPU"
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
	@# Not from the root: "python -m pytest" would import the source folder instead. The sanitizers'
	@# reports go past Python's sys.stderr: --capture=sys.
	cd $(SANITIZE_VENV) && \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYMCIP_EXAMPLES=0.2 \
	  bin/python -m pytest -c ../pyproject.toml --rootdir .. --capture=sys \
	  -k "not torch and not faiss" ../tests/test_topk.py ../tests/test_ranks.py

demo: setup
	$(BIN)/pymcip demo

# Reads docstrings from the source folder, and the options from the installed package.
docs: setup
	$(BIN)/python -m pip install --quiet "$$(ls dist/*.whl)[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: setup
	$(BIN)/python -m pip install --quiet "$$(ls dist/*.whl)[bench]"
	$(BIN)/python bench/bench_margin_softmax.py
	$(BIN)/python bench/bench_topk.py
	$(BIN)/python bench/bench_metrics.py
	$(BIN)/python bench/bench_train.py
	$(BIN)/python bench/bench_depthwise.py

gpu-check:
	$(GPU_PYTHON) bench/gpu_check.py --wheels $(GPU_WHEELS) $(if $(OUT),--out $(OUT)) \
	  $(if $(SECONDS),--seconds $(SECONDS))

gpu-check-rehearsal: setup
	$(BIN)/python bench/gpu_check.py --rehearse --wheels $(GPU_WHEELS) $(if $(OUT),--out $(OUT))

# All that a machine with torch, CUDA's tools and pytest may lack, for its Python and not this one's.
gpu-wheels: $(VENV)/created
	rm -f $(GPU_WHEELS)/*.whl
	$(BIN)/python -m pip download --quiet --dest $(GPU_WHEELS) --no-deps --only-binary=:all: \
	  --implementation cp --python-version $(GPU_PYTHON_VERSION) --platform manylinux_2_28_x86_64 \
	  --platform manylinux2014_x86_64 $(GPU_PACKAGES)
	@bytes=$$({ git ls-files -z; find $(GPU_WHEELS) -type f -print0; } | du -cb --files0-from=- \
	  | tail -1 | cut -f1); ls $(GPU_WHEELS); \
	echo "$(GPU_WHEELS) and the files under version control: $$((bytes >> 10)) KiB"; \
	[ $$bytes -le $$((64 << 20)) ] || { \
	  echo "That is more than 64 MiB, the most that may be carried: take packages out of GPU_PACKAGES"; \
	  exit 1; }

clean:
	rm -rf $(VENV) .venv-gpu $(SANITIZE_VENV) build dist gpu-wheels
