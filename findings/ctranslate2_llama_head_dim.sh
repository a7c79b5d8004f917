#!/usr/bin/env bash
# CTranslate2 4.8.5: a Llama with another head_dim than hidden_size / num_attention_heads has other logits, silently.
#
# Its converter from transformers passes head_dim on for other architectures, such as Qwen3, but not for Llama. Conversion
# and loading succeed without a warning. The same model with heads of that width agrees to rounding. Both have as many
# key heads as heads; with fewer, the first text gives an error.
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 ctranslate2==4.8.5

cat >demo.py <<'PYTHON'
import sys
from importlib.metadata import version

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print(*(f"{name} {version(name)}" for name in ("ctranslate2", "transformers", "torch")))
TOKENS = ["<s>", "</s>", "<unk>", *(f"t{number}" for number in range(61))]
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
inner = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def difference(**settings):
    """The largest difference of a log-probability between transformers and CTranslate2."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **settings)).eval()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    TransformersConverter("model").convert("converted", force=True)
    ids = torch.arange(3, 63)
    with torch.no_grad():
        expected = model(ids[None]).logits[0].log_softmax(-1).numpy()
    generator = ctranslate2.Generator("converted", compute_type="float32")
    tokens = [TOKENS[number] for number in ids]
    return float(np.abs(np.array(generator.forward_batch([tokens], return_log_probs=True))[0] - expected).max())


seen = {
    "head_dim 16 = 64 / 4": difference(head_dim=16),
    "head_dim 32": difference(head_dim=32),
}
for name, value in seen.items():
    print(f"{name}: largest difference {value:.1e}")
plain, wide = seen.values()
sys.exit(not (plain < 1e-3 and wide > 0.1))
PYTHON
venv/bin/python demo.py 2>/dev/null

# Output:
# ctranslate2 4.8.5 transformers 5.23.0 torch 2.13.0+cpu
# head_dim 16 = 64 / 4: largest difference 2.4e-05
# head_dim 32: largest difference 3.0e+00
