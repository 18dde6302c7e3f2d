# make demo    set up and run the whole pipeline on data that it makes itself
# make view    show what make demo made in your browser (CONFIG=FILE: what that config predicted)
# make segment RAW=volume.zarr   set up and segment a volume with the shipped weights (OUT=result.zarr DATASET=volumes/raw)
# make setup   create the virtual environment with what the scripts need, and nothing else
# make test    add what the tests need, and run them all
# make fuzz    give damaged and odd input to whatever reads files: CASES=10000 of each kind
# make torture kill, stop and starve the whole chain at random: MINUTES=60 SEED=1 (OPTIONS=--mongodb)
# make bench   measure this suite against other libraries, and write docs/benchmarks.md; make bench-full takes longer
# make lint    add the linters, and check style, spelling, imports and types
# make dev     add both, and pre-commit
# make clean   remove what the other targets made

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
INSTALL = $(RUN) -m pip install --progress-bar off --constraint constraints.txt --editable

.PHONY: demo view segment raw-named test fuzz torture bench bench-full lint dev setup clean

demo: setup
	$(RUN) demo.py

view: CONFIG ?= demo_data/lsd_checkpoints/MTLSD_3D/PHANTOM/run/config_predict.yaml
view: setup
	@test -f "$(CONFIG)" || { echo "error: no $(CONFIG): run make demo first, or name a config: make view CONFIG=FILE" >&2; exit 2; }
	$(RUN) view.py -c "$(CONFIG)" $(OPTIONS)

segment: raw-named setup
	$(RUN) segment.py --raw "$(RAW)" $(if $(OUT),--out "$(OUT)") $(if $(DATASET),DATA.RAW "$(DATASET)")

raw-named:
	@test -n "$(RAW)" || { echo "error: no RAW: make segment RAW=volume.zarr" >&2; exit 2; }

test: $(VENV)/ready-test
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

fuzz: CASES ?= 10000
fuzz: $(VENV)/ready-test
	FUZZ_CASES=$(CASES) $(RUN) -m pytest tests/test_fuzz_*.py

torture: MINUTES ?= 10
torture: $(VENV)/ready-test
	$(RUN) -m tests.torture --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(OPTIONS)
	$(RUN) -m tests.torture --segment --faults POWER --moments 20 --minutes 60 $(if $(SEED),--seed $(SEED))

bench bench-full: $(VENV)/ready-bench
	$(RUN) benchmarks/run.py $(if $(filter bench-full,$@),--full)
	$(RUN) benchmarks/table.py

lint: $(VENV)/ready-lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/lint-imports
	$(RUN) -m mypy

dev: $(VENV)/ready-dev

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $$($(PYTHON) --version 2>&1) is too old or missing: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $(PYTHON) has no venv: install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	@echo "installing the packages that the scripts need into $(VENV): this takes a few minutes the first time"
	$(INSTALL) .
	@touch $@

# One stamp for each extra of pyproject.toml.
$(VENV)/ready-test $(VENV)/ready-bench $(VENV)/ready-lint $(VENV)/ready-dev: $(VENV)/ready-%: $(VENV)/ready
	@echo "adding the packages of the extra '$*' to $(VENV)"
	$(INSTALL) '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) demo_data build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
