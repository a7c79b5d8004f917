# The README gives the same steps for people without make.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-all test-gpu chaos lint clean

# One minute of training on two CPU cores, a sample, the loss curve.
demo: $(VENV)/demo
	@set -e; dataset=shakespeare_char; \
	$(PY) data/shakespeare_char/prepare.py || { dataset=pydocs_char; \
	  echo "Tiny Shakespeare cannot be downloaded: training on Python's own documentation instead."; \
	  $(PY) data/pydocs_char/prepare.py; }; \
	$(PY) train.py config/train_shakespeare_char_cpu.py --dataset=$$dataset --minutes=1 --out_dir=out-demo; \
	$(PY) sample.py --out_dir=out-demo --num_samples=1 --max_new_tokens=500; \
	$(PY) compare.py out-demo --out=out-demo/loss.png; \
	echo; echo "Try next:"; \
	echo "  $(PY) sample.py --out_dir=out-demo --interactive=True"; \
	echo "  $(PY) train.py config/train_shakespeare_char_cpu.py --dataset=$$dataset --minutes=5 --out_dir=out-5-minutes"; \
	echo "  $(PY) export.py --out_dir=out-demo --to=exports/demo"

test: lint
	$(PY) -m pytest -m "not slow" -n 2

test-all: lint
	$(PY) -m pytest

test-gpu: $(VENV)/dev
	$(PY) -m pytest tests/gpu

chaos: $(VENV)/dev
	$(PY) tests/chaos/chaos.py --kills=110 --pair_kills=5
	$(PY) tests/chaos/folders.py --deeds=200

lint: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(VENV)/demo $(VENV)/dev: $(VENV)/%: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) out-demo
