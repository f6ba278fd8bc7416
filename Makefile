# make demo: the main job end to end on embedded data.  make test: the tests.  Both set everything up first.
PYTHON ?= python3
BIN := .venv/bin
RANKS ?= 2
# Ranks, readers and BLAS share few cores: threads that wait must sleep, not spin.
export OMP_WAIT_POLICY ?= passive
# Without bytecode each process compiles torch and all else anew: seconds. uv writes none by itself.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-gpu soak lint format bench rehearsal clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable . --group dev
	touch $@

DEMO := runs/demo

demo: setup
	$(BIN)/python tools/shard.py digits $(DEMO)/data --name digits
	$(BIN)/python tools/noise.py $(DEMO)/data --model symmetric --rate 0.8 --seed 0 --name sym80
	@echo; echo "Digits, 80 % of the labels drawn at random, $(RANKS) ranks:"; echo
	$(BIN)/nldist compare configs/demo.yaml run.dir=$(DEMO) --methods cross_entropy,dividemix,scanmix \
	    --cluster local --tasks-per-node $(RANKS)
	@echo; echo "The labels, as ScanMix sees them:"; $(BIN)/nldist audit $(DEMO)/scanmix-0
	@echo; echo "Plots:"; ls $(DEMO)/*.png $(DEMO)/*/plots/*.png $(DEMO)/stages/*/plots/*.png
	@echo; echo "Which labels are wrong: $(DEMO)/scanmix-0/audit/index.html (open it in a browser)"
	@echo "To look at all runs:    $(BIN)/mlflow ui --backend-store-uri sqlite:///$(DEMO)/mlflow.db"

# Many tests wait for processes that start or time out; two at a time use that.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What needs an NVIDIA GPU, or two: without one all are skipped.
test-gpu: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu

# The slow tests, and a run on a Slurm cluster through twenty disturbances; as root, after .ci/install.
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.slurm.soak

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One table of ratios against references, in under 15 minutes; ARGS="mixture shard": some of it.
bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py $(ARGS)

# All that nldist does with 2.4 M tiny images on two ranks; an hour, 25 GB. ARGS="--scale 0.01": minutes.
rehearsal: setup
	$(BIN)/python benchmarks/rehearsal.py $(ARGS)

clean:
	rm -rf runs .venv
