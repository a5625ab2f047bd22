# make train   from nothing to a fine-tuned tiny Qwen       make test    everything this machine can run
# make check   lint, format, types                          make gpu     the tests that need a CUDA GPU
# make gpu-speed PART=whole   how fast a GPU is, beside plain transformers and peft
# make chaos   kills runs 200 times and signals them 50    make clean   remove .venv and build leftovers
# make test-quick  the tests that train no whole run, and need no cluster
# make test-slow   the long tests: all pairs of the resume matrix, ten random disturbances of a Slurm job ...
# make dist   a wheel and a source archive, in dist/
# make docs   the documentation as a site, in site/
# make slurm-up, slurm-down   a Slurm cluster on this machine, the one that the tests use
#
# PYTHON=python3.12 make train   chooses the interpreter (3.11 to 3.13)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := README.md pyproject.toml setup.cfg __init__.py py.typed $(shell find adapter cli configs data jobs launch plan run slurm trainer \
	-name '*.py' -o -name '*.yaml' -o -name '*.jsonl' -o -name '*.sh' -o -name '*.html' -o -name '*.md' -o -name '*.jinja' -o -name schema.json)

.PHONY: dist docs train test test-quick test-slow gpu gpu-speed chaos slurm-up slurm-down check format schema clean system
.DELETE_ON_ERROR:

train: $(VENV)/.installed
	@echo '== training the embedded default: configs/tiny.yaml -> runs/tiny'
	$(BIN)/qwenlora train configs/tiny.yaml
	@echo '== asking the base model and the tuned one'
	$(BIN)/qwenlora compare runs/tiny --show 1
	@echo '== writing the run up as a page'
	$(BIN)/qwenlora report runs/tiny
	@echo '== next: open runs/tiny/report.html in a browser, talk to it with `$(BIN)/qwenlora chat runs/tiny`,'
	@echo '== and try your own rows: README.md, "Your data, one GPU"'

test: $(VENV)/.installed-test
	@echo '== running the tests that this machine can run, two at a time, and those on a Slurm cluster beside them'
	@tests/run.sh $(BIN)/python

test-quick: $(VENV)/.installed-test
	@echo '== running the tests that train no whole run, two at a time'
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not long and not slurm'

test-slow: $(VENV)/.installed-test
	@echo '== running the tests that take long, or show again what quicker ones show'
	$(BIN)/python -m pytest -s -m long

# PART: of the tests, as pytest's -k takes it
gpu: $(VENV)/.installed-test
	@echo '== running the tests that need a CUDA GPU'
	$(BIN)/python -m pytest -m gpu $(if $(PART),-k '$(PART)') $$(grep -rl --include='*.py' 'mark\.gpu' tests)

# PART: ceilings, whole, leave-out, experts, nf4
gpu-speed: $(VENV)/.installed-test
	@echo '== measuring steps on this GPU (benchmarks/README.md)'
	$(BIN)/python benchmarks/gpu.py $(PART)

chaos: $(VENV)/.installed-test
	@echo '== killing runs at random moments (about an hour and a half on two cores)'
	CHAOS_KILLS=200 CHAOS_SIGNALS=50 $(BIN)/python -m pytest -s tests/chaos

slurm-up:
	@echo '== a Slurm cluster with two nodes on this machine (needs root; tests/slurm/cluster.sh install gets the packages)'
	@tests/slurm/cluster.sh up
	@echo '== it runs until `make slurm-down`; for sbatch and squeue in this shell:'
	@tests/slurm/cluster.sh env

slurm-down:
	@tests/slurm/cluster.sh down

check: $(VENV)/.installed-test
	@echo '== lint and format (ruff), types (mypy, on the installed package)'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p qwenlora

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.installed
	$(BIN)/qwenlora config schema > configs/schema.json
	$(BIN)/qwenlora config keys --markdown > docs/config.md
	$(BIN)/qwenlora recipes --markdown > docs/recipes.md

dist: $(VENV)/.installed
	@echo '== making dist/: a wheel and a source archive'
	$(BIN)/python -c 'from setuptools import build_meta as made; print(made.build_wheel("dist"), made.build_sdist("dist"))'
	@rm -rf build

docs: $(VENV)/.installed-test
	@echo '== making site/: open site/index.html'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build site *.egg-info

# ---- installing. torch comes first: what follows must find it, not bring another one

system:
	@command -v $(PYTHON) >/dev/null || { echo '$(PYTHON) is missing. Install it: sudo apt-get install python3 python3-venv'; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "$$($(PYTHON) --version) is not supported, 3.11 to 3.13 are. Choose one: PYTHON=python3.12 make train"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'Python has no venv module. Install it: sudo apt-get install python3-venv'; exit 2; }
	@[ "$$(uname -s)" = Linux ] || { echo 'qwenlora runs on Linux; on Windows, WSL2 works'; exit 2; }

$(VENV)/.dependencies: setup.cfg constraints.txt | system
	@echo '== installing into $(VENV) (torch and its friends; a few minutes the first time)'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel torch
	@rm -rf build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt .
	@touch $@

# a real install, not an editable one: the tests and mypy see what users get
$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	@rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	@rm -rf build
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo '== installing the test extra'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[test]'
	@rm -rf build
	@touch $@
