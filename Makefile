VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python

.PHONY: setup demo test lint docs fuzz kill audit clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -e '.[dev,docs]'
	touch $@

# The main job: `make demo` on the shipped model, `make demo MODEL=dir DATA=file` on your own.
demo: setup
	$(RUN) -m bbb_ao.demo --overwrite $(if $(MODEL),--model '$(MODEL)',--set sequences=64) \
		$(if $(DATA),--data '$(DATA)') $(ARGS)

test: setup lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest -n 2 $(ARGS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

# 100 random kills of a tiny run, and one at every boundary of its writing; minutes.
kill: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m benchmarks.kill --kills 100 --boundaries $(ARGS)

# The book, in build/docs/index.html.
docs: setup
	$(RUN) -m sphinx -q -W --keep-going docs build/docs

# The readers of untrusted files, for ten minutes in all; SECONDS=60 for one. Finds are written below build/fuzz.
SECONDS ?= 600
fuzz: setup
	$(RUN) -m pip install -q -e '.[fuzz]'
	$(RUN) fuzz/run.py $(SECONDS)

# Known weaknesses of what is installed; fails where the advisories of a package cannot be looked up, too.
audit: setup
	$(RUN) -m pip install -q -e '.[audit]'
	mkdir -p build
	# Without local versions (2.13.0+cpu), which advisories do not know.
	$(RUN) -m pip list --exclude-editable --format freeze | sed 's/+.*//' > build/installed.txt
	$(RUN) -m pip_audit --strict --disable-pip --no-deps -r build/installed.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
