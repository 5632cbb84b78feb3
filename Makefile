# make train | test | quick | soak | bench | ui | lint | format | docs | clean. Everything lives in .venv and runs, both inside the checkout.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# -q: the launcher's own remarks would hide ours. DeepSpeed finds GPUs by itself; without one it would warn at each start.
DEEPSPEED := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo DS_ACCELERATOR=cpu) $(VENV)/bin/deepspeed -q
DATA := runs/data/bladder
PARALLEL := -n auto --maxprocesses 4

export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# torch compiles DeepSpeed operators with the ninja that lies there.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: train test quick soak bench ui lint format docs venv clean

train: venv $(DATA)/manifest.json
	@$(RUN) -m mdnet_dist.metrics.wordnet runs/nltk_data
	@$(DEEPSPEED) launch/train.py launch/configs/demo.yaml data.shards=$(DATA)

$(DATA)/manifest.json: | venv
	@$(RUN) -m data_shards synth --out $(DATA) --images 1000 --patients 32 --size 128 --seed 0 --force

# Lint, types, then every test. The slow ones start several processes each: two at a time, a file's tests together.
test: venv lint
	$(RUN) -m mdnet_dist.metrics.wordnet runs/nltk_data
	NLTK_DATA=$(CURDIR)/runs/nltk_data $(RUN) -m pytest -m "not slow" $(PARALLEL)
	NLTK_DATA=$(CURDIR)/runs/nltk_data $(RUN) -m pytest -m slow -n 2 --dist loadfile --durations 10

# The long versions of what is random: kills, faults, mutated files, epochs. Figures go to runs/soak.
soak: venv
	MDNET_SOAK=1 $(RUN) -m pytest tests/test_soak.py tests/test_resume.py tests/test_faults.py tests/test_fuzz.py tests/test_checkpoint.py tests/test_damage.py --durations 10
	@$(RUN) -m tests.soak

# Ratios of things that run in turn, on this machine; nothing else should run on it. A table, and JSON in runs/benchmark.
bench: venv $(DATA)/manifest.json
	@$(RUN) -m mdnet_dist.metrics.wordnet runs/nltk_data
	@$(RUN) launch/benchmark.py --short

quick: venv
	$(RUN) -m pytest -m "not slow" $(PARALLEL)

ui: venv
	@$(RUN) launch/mlflow_ui.py

lint: venv
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: venv
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: venv
	$(RUN) -m mdnet_dist.config_docs > docs/configuration.md
	$(RUN) -m tune.search_docs > docs/search_file.md

venv: $(VENV)/.ready

# DeepSpeed's build imports torch, so torch comes first and its build environment is this one. DS_BUILD_OPS=0: operators
# are compiled when first used. A log is kept, because pip's output is of interest only when it fails.
$(VENV)/.ready: constraints.txt setup.cfg pyproject.toml
	@echo "installing into $(VENV) (some minutes; log in $(VENV)/install.log)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@( $(VENV)/bin/pip install -c constraints.txt "setuptools>=70,<85" wheel numpy torch \
	&& DS_BUILD_OPS=0 $(VENV)/bin/pip install -c constraints.txt --no-build-isolation deepspeed \
	&& $(VENV)/bin/pip install -c constraints.txt --no-build-isolation -e '.[dev,dicom]' ) > $(VENV)/install.log 2>&1 \
	|| { tail -20 $(VENV)/install.log; echo "installing failed; the whole log is $(VENV)/install.log"; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
