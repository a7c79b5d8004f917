# The README gives the same steps for people without make.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEMO := --max_iters=800 --eval_interval=200

.PHONY: demo test test-all chaos lint clean

demo: $(VENV)/demo
	@set -e; dataset=shakespeare_char; \
	$(PY) data/shakespeare_char/prepare.py || { dataset=pydocs_char; \
	  echo "Tiny Shakespeare is out of reach: the demo trains on Python's own documentation instead."; \
	  $(PY) data/pydocs_char/prepare.py; }; \
	$(PY) train.py config/train_shakespeare_char_cpu.py --dataset=$$dataset --out_dir=out-demo $(DEMO); \
	$(PY) sample.py --out_dir=out-demo --num_samples=2 --max_new_tokens=400; \
	$(PY) compare.py out-demo --out=out-demo/loss.png

test: lint
	$(PY) -m pytest -m "not slow" -n 2

test-all: lint
	$(PY) -m pytest

chaos: $(VENV)/dev
	$(PY) tests/chaos/chaos.py --kills=110 --pair_kills=5 --changes=2

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
