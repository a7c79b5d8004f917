"""Conversations in tokens against transformers' apply_chat_template."""

from pathlib import Path

import pytest
import transformers
from texts import answer_texts

from nanogpt.text.chat import CHATML_TEMPLATE, Chat
from nanogpt.text.tokenizer import Tokenizer

# Like Qwen3's: a place to think before the last answer, which earlier answers lose, and a default system message.
THINKING_TEMPLATE = """
{%- if messages[0].role != 'system' %}{{- bos_token + '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<|im_start|>assistant\\n<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
        {{- message.content.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [
    {"role": "user", "content": "What is two and two?\n\nDon't guess."},
    {"role": "assistant", "content": "It's 4 — surely."},
    {"role": "user", "content": "日本?"},
    {"role": "assistant", "content": "Größe 😀"},
]
ANSWERS = ["It's 4 — surely.<|im_end|>", "Größe 😀<|im_end|>"]
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module", params=[CHATML_TEMPLATE, THINKING_TEMPLATE], ids=["chatml", "thinking"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = Tokenizer.train_bpe([Path(__file__).read_text(encoding="utf-8")], 600)
    tokenizer.template = request.param
    return tokenizer


@pytest.mark.parametrize("length", [2, 4])
def test_chat_gives_transformers_ids(length: int, tokenizer: Tokenizer, tmp_path: Path):
    is_thinking = tokenizer.template == THINKING_TEMPLATE
    talk = TALK[:length] if is_thinking else [SYSTEM, *TALK[:length]]
    tokenizer.save_pretrained(tmp_path, 512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded is not None

    chat = Chat(loaded)
    ids, mask = chat.encode(talk)
    assert ids.tolist() == [*theirs.apply_chat_template(talk)["input_ids"], tokenizer.end_of_text]
    prompt = theirs.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"]
    assert chat.encode_prompt(talk[:-1]) == prompt
    assert chat.stop_ids == {tokenizer.end_of_text, tokenizer.special_tokens["<|im_end|>"]}

    *earlier, last = ANSWERS[: length // 2]
    assert answer_texts(tokenizer, ids, mask) == [*earlier, NO_THOUGHT * is_thinking + last]


def test_chat_counts_the_reasoning_of_the_last_answer(tokenizer: Tokenizer):
    ids, mask = Chat(tokenizer).encode([TALK[0], TALK[1] | {"reasoning_content": "easy"}])
    is_thinking = tokenizer.template == THINKING_TEMPLATE
    assert answer_texts(tokenizer, ids, mask) == ["<think>\neasy\n</think>\n\n" * is_thinking + ANSWERS[0]]


@pytest.mark.parametrize("answer", ["\n\nx", " x", "'s", "x" * 50, ""])
def test_encode_prompt_is_the_conversation_up_to_the_answer(answer: str, tokenizer: Tokenizer):
    """Id for id, however the answer begins, so sampling continues from a text that training had."""
    chat = Chat(tokenizer)
    ids, mask = chat.encode([*TALK[:3], {"role": "assistant", "content": answer}])
    prompt = chat.encode_prompt(TALK[:3])
    assert ids.tolist()[: len(prompt)] == prompt
    assert mask[len(prompt) - 1 : len(prompt) + 1].tolist() == [0, 1]
