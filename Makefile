PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests stay in one process, because they share what they train; tests/conftest.py has the longest files first.
SPREAD := --dist loadfile --no-loadscope-reorder

.PHONY: install install-slurm install-browser quickstart smoke lint test test-fast bench-check clean

# The environment is made anew where pip does not start: an install that was interrupted leaves a python without it.
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "python3 has no venv: sudo apt-get install python3-venv python3-dev gcc"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and alone: another package's range would take the newest build with its CUDA packages
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# For the tests, which start and stop a Slurm of their own; without root they say why they are skipped.
install-slurm:
	@command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null || \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && \
			DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; \
		else \
			echo "no Slurm installed: that takes root and Debian's packages (slurm-wlm, munge)"; \
		fi

# For the tests of the report's pages; without root they say why they are skipped.
install-browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && \
			DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
		else \
			echo "no browser installed: that takes root and Debian's packages (chromium, chromium-driver)"; \
		fi

quickstart: install
	$(BIN)/embervlm quickstart --output_dir outputs/quickstart

smoke: install
	$(BIN)/embervlm quickstart --output_dir outputs/smoke --smoke

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-fast: install
	$(BIN)/pytest $(SPREAD) -n 2 -m "not slow"

test: lint install-slurm install-browser
	$(BIN)/pytest $(SPREAD) -n 3 -m "not timed"
	$(BIN)/pytest -m timed

# Before a release, on a quiet machine: a training step beside a bare loop and without its groups, in under three minutes.
bench-check: install
	test -e outputs/smoke/stage4/phase2/checkpoint-final || $(BIN)/embervlm quickstart --output_dir outputs/smoke --smoke
	$(BIN)/python benchmarks/training_speed.py --run outputs/smoke --check

clean:
	rm -rf $(VENV) outputs build *.egg-info
