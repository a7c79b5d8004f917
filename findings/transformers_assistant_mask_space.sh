#!/usr/bin/env bash
# transformers 5.23.0: return_assistant_tokens_mask loses a whole conversation's answers after one leading space.
#
# A chat template marks what the assistant says with {% generation %} blocks, and apply_chat_template turns them into a
# mask of tokens. With a byte-level tokenizer whose offsets are trimmed (ByteLevel(trim_offsets=True)), no token's
# offsets hold the space that a block begins with. The mask then is 0 for this block and for ALL later blocks, without a
# warning: the conversation trains nothing. And whatever the offsets, a block that ends in a character of several tokens,
# such as an emoji, is marked to the first of them alone, so the model learns to end an answer in half a character.
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6

cat >demo.py <<'PYTHON'
import sys
from importlib.metadata import version

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'a' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)


def marked_text(trim_offsets, *contents):
    """The text under the mask of a conversation, whose even contents are questions and whose odd ones answers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<u>", "<a>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    encoded = tokenizer.apply_chat_template(
        [{"role": "ua"[i % 2], "content": content} for i, content in enumerate(contents)],
        chat_template=TEMPLATE,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return tokenizer.decode([i for i, is_answer in zip(encoded["input_ids"], encoded["assistant_masks"]) if is_answer])


print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
seen = {}
for trim_offsets in (True, False):
    for answer in ("yes", " yes", "yes \N{SLIGHTLY SMILING FACE}"):
        seen[trim_offsets, answer] = marked_text(trim_offsets, "hi", answer, "ok", "no")
        print(f"trim_offsets={trim_offsets}, answers {answer!r} and 'no': masked {seen[trim_offsets, answer]!r}")
usual = seen[True, "yes"] == "yesno" and seen[False, " yes"] == " yesno"
surprising = seen[True, " yes"] == "" and seen[False, "yes \N{SLIGHTLY SMILING FACE}"] == "yes \ufffdno"
sys.exit(not (usual and surprising))
PYTHON
venv/bin/python demo.py 2>/dev/null

# Output:
# transformers 5.23.0 tokenizers 0.23.3
# trim_offsets=True, answers 'yes' and 'no': masked 'yesno'
# trim_offsets=True, answers ' yes' and 'no': masked ''
# trim_offsets=True, answers 'yes 🙂' and 'no': masked 'yes �no'
# trim_offsets=False, answers 'yes' and 'no': masked 'yesno'
# trim_offsets=False, answers ' yes' and 'no': masked ' yesno'
# trim_offsets=False, answers 'yes 🙂' and 'no': masked 'yes �no'
