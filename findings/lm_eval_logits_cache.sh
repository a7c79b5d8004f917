#!/usr/bin/env bash
# lm-evaluation-harness 0.4.13: its Hugging Face backend returns wrong log-likelihoods with its default logits_cache=True.
#
# Requests whose context + continuation agree in all tokens but the last share a forward pass, also if they are split at
# different places ("a b|c d e" and "a b c|d f"). The pass keeps the logits of the longest continuation. Shorter ones
# are then gathered from its first positions instead of its last: P(d | a b) P(f | a b c) for "a b c|d f". Whether each
# token is the most probable is read from the last ones, correctly. So multiple choice is scored wrongly if two examples
# overlap like this, and the perplexity of a repetitive text depends on the batch size.
#
# Exits with 0 while this is so, with 1 if it has changed. Takes minutes, for the installation; a torch for CPUs is a
# tenth as large: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash findings/lm_eval_logits_cache.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 lm_eval==0.4.13
export HF_HUB_OFFLINE=1

cat >demo.py <<'PYTHON'
import importlib.metadata
import logging
import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

logging.disable(logging.WARNING)
for package in ("lm_eval", "transformers", "torch"):
    print(package, importlib.metadata.version(package))

words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("<end> a b c d e f".split())}))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<end>", eos_token="<end>")
torch.manual_seed(0)
config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=7, n_positions=8, initializer_range=0.3)
model = GPT2LMHeadModel(config).eval()


def run(method, *requests, **options):
    backend = HFLM(pretrained=model, tokenizer=tokenizer, **options)
    return getattr(backend, method)([Instance(method, {}, request, i) for i, request in enumerate(requests)], True)


def logprob(text, first):
    """Of the tokens from `first` on, from a forward pass of transformers."""
    ids = torch.tensor([tokenizer.encode(text)])
    logprobs = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
    return logprobs[first - 1 :].sum().item()


with torch.no_grad():
    requests = [("a b", " c d e"), ("a b c", " d f")]
    expected = [logprob("a b c d e", 2), logprob("a b c d f", 3)]
    cached = [score for score, _ in run("loglikelihood", *requests)]
    uncached = [score for score, _ in run("loglikelihood", *requests, logits_cache=False)]
print("loglikelihood         a b|c d e  a b c|d f")
for name, scores in (("transformers", expected), ("logits_cache=False", uncached), ("default", cached)):
    print(f"{name:20} {scores[0]:10.4f} {scores[1]:10.4f}")

text = " ".join("a" * 20)  # two windows and a half
rolling = [run("loglikelihood_rolling", (text,), batch_size=size)[0] for size in (1, 4)]
right = run("loglikelihood_rolling", (text,), batch_size=4, logits_cache=False)[0]
print(f"loglikelihood_rolling of 20 a: {rolling[0]:.4f} (batch_size=1), {rolling[1]:.4f} (batch_size=4)")
print(f"                               {right:.4f} (batch_size=4, logits_cache=False)")

close = lambda one, other: abs(one - other) < 1e-3
shown = all(map(close, uncached, expected)) and close(cached[0], expected[0]) and close(rolling[0], right)
shown = shown and not close(cached[1], expected[1]) and not close(rolling[1], right)
print("the scores are wrong" if shown else "CHANGED: the scores are not wrong in this way")
sys.exit(not shown)
PYTHON
venv/bin/python demo.py 2>errors.txt || { status=$?; tail -n 5 errors.txt >&2; exit "$status"; }
