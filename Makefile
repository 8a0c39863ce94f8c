# make run | test | check | bench: on a fresh machine with Python 3.11 or newer each installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
# Processes that test; each uses one torch thread, so that they do not fight for the cores.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadgroup
ENGINE := blocks compiled fused head_sampling kept memory normals processors products replicas samplers sampling \
	settings_llc

.PHONY: run test test-long test-avx2 lint fix check regression bench bench-job bench-accuracy bench-heads bench-calibration clean

run: .venv/installed
	$(BIN)/mechgrok run modular-addition

test: .venv/installed
	$(PYTEST) -m "not long"

# Those that take over 20 seconds each.
test-long: .venv/installed
	$(PYTEST) -m long

# The engine's tests once more as on a processor without AVX512. A name alone would leave numba this one's features.
test-avx2: .venv/installed
	NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES= ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
		$(PYTEST) $(ENGINE:%=tests/test_%.py)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What CI runs.
check: lint test test-long test-avx2

# The project's own regression check: the quick preset against the committed baseline.
regression: .venv/installed
	$(BIN)/mechgrok run modular-addition-quick --out runs/regression
	$(BIN)/mechgrok check runs/regression --against tests/baseline.json

# Seconds per draw beside devinterp, effective samples of samplers, and how cost grows: over an hour.
bench: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed --engines mechgrok "mechgrok, baoab" "mechgrok, int16" \
		"mechgrok, baoab, int16" "mechgrok, torch" "mechgrok, AVX2" --write docs/speed.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.effective --write docs/effective.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scaling --write docs/scaling.md

bench-job: .venv/installed
	$(BIN)/python -m benchmarks.main_job

# Known learning coefficients, per sampler and beside devinterp, and the coverage of the error bars: under 20 minutes.
bench-accuracy: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.accuracy --write docs/accuracy.md

# Three seeds of heads-planted and of its control, and seed 0's heads at other sampling settings: about an hour.
bench-heads: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.head_seeds --write docs/heads-seeds.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.head_settings --write docs/heads-settings.md

# What `calibrate` recommends on four kinds of problem.
bench-calibration: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.calibration --write docs/calibration.md

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mechgrok needs Python 3.11 or newer; pass PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
