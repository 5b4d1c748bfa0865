# `make demo` and `make test` set up what they need by themselves.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
COHORT := .venv/.cohort

.PHONY: setup cohort demo demo-diffusion test faults lint lock bench clean
setup: $(STAMP)            ## create .venv and install requirements.txt

$(STAMP): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -r requirements.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -e .
	touch $@

cohort: $(COHORT)          ## Snakemake beside it, for workflow/

$(COHORT): $(STAMP) requirements-cohort.txt
	$(BIN)/uv pip install --python $(BIN)/python -r requirements.txt -r requirements-cohort.txt
	touch $@

demo: $(STAMP)             ## the whole walk on a simulated sample: demo_run/index.html
	bash assets/demo.sh

demo-diffusion: demo       ## Stable Diffusion on the demo's patches, in pixel space: demo_run/diffusion.html
	bash assets/demo_diffusion.sh

test: $(COHORT)            ## every test, one file at a time on each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations=15

faults: $(COHORT)          ## the fault tests in full, with a table of what was tried
	FAULT_ROUNDS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --timeout 7200 -m fault

lock: $(STAMP)             ## requirements-lock.txt anew: exact versions with hashes, for Python 3.10-3.12
	printf '%s\n' '# Every package of requirements.txt and requirements-cohort.txt, one version each, with the hashes of its files.' \
	    '# Made by `make lock`; installed by `pip install --require-hashes -r requirements-lock.txt`.' > requirements-lock.tmp.txt
	$(BIN)/uv pip compile requirements.txt requirements-cohort.txt --universal --python-version 3.10 --generate-hashes --upgrade \
	    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet >> requirements-lock.tmp.txt
	mv requirements-lock.tmp.txt requirements-lock.txt

lint: $(STAMP)             ## style
	$(BIN)/ruff check .

bench: $(STAMP)            ## print the figures of benchmarks/RESULTS.md
	for name in preprocessing loading clip gan diffusion evaluation; do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:                     ## remove what runs left behind; .venv stays
	rm -rf demo_run build *.egg-info .pytest_cache .ruff_cache
