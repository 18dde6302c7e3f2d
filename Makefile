# make demo   set up and run the whole pipeline on data that it makes itself
# make segment RAW=volume.zarr   set up and segment it with the weights that ship (OUT=result.zarr DATASET=volumes/raw)
# make test   set up and run all tests
# make lint   set up and check style
# make setup  the virtual environment alone
# make clean  remove what the other targets made

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo segment raw-named test lint setup clean

demo: setup
	$(RUN) demo.py

segment: raw-named setup
	$(RUN) segment.py --raw "$(RAW)" $(if $(OUT),--out "$(OUT)") $(if $(DATASET),DATA.RAW "$(DATASET)")

raw-named:
	@test -n "$(RAW)" || { echo "error: no RAW: make segment RAW=volume.zarr" >&2; exit 2; }

test: setup
	$(RUN) -m pytest

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $$($(PYTHON) --version 2>&1) is too old or missing: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $(PYTHON) has no venv: install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	@echo "installing the packages of constraints.txt into $(VENV): a few minutes the first time"
	$(RUN) -m pip install --progress-bar off --constraint constraints.txt '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) demo_data build *.egg-info .pytest_cache .ruff_cache
