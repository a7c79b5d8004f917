"""Conversations as tokens against transformers' apply_chat_template, for templates in the style of published models."""

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import tokenizers
import transformers
from texts import answer_texts

from nanogpt.text.chat import Chat
from nanogpt.text.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parents[1] / "fixtures/chat_templates"  # with {% generation %} around each answer
SPECIAL_TOKENS = {  # bos, eos and others
    "chatml": "<|endoftext|> <|im_end|> <|im_start|>",
    "qwen3": "<|endoftext|> <|im_end|> <|im_start|>",
    "llama-2": "<s> </s>",
    "llama-3": "<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|>",
    "mistral": "<s> </s> [INST] [/INST]",
    "gemma": "<bos> <eos> <start_of_turn> <end_of_turn>",
    "phi-3": "<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
    "deepseek": "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>",
    "smollm2": "<|im_start|> <|im_end|> <|endoftext|>",
    "zephyr": "<s> </s>",
    "trims": "<s> <end>",
    "branches": "<s> <end> <long> <question>",
    "json": "<s> <end>",
}
SENTENCE_PIECE = ("llama-2", "mistral", "gemma", "phi-3", "zephyr")  # the others have byte-level BPE
PREFIX_SPACE = ("llama-2", "phi-3")  # at the start of the text and after each special token

SYSTEM = {"role": "system", "content": "Be kind."}
ASK = {"role": "user", "content": "What is two and two?\n\nDon't guess."}
ANSWER = {"role": "assistant", "content": "It's 4 — surely."}
THOUGHT = {"role": "assistant", "content": "<think>\nTwo, <b>two</b>.\n</think>\n\nYes: 4."}
REASONING = {"role": "assistant", "content": "Four.", "reasoning_content": "\nA sum?\n"}
THANKS = {"role": "user", "content": "  日本 \t"}
WELCOME = {"role": "assistant", "content": "  Größe 😀\n\n"}
RESULT = {"role": "tool", "content": '{"sum": 4, "<|im_stop|>": "<s"}'}
TALKS = {
    "one answer": [ASK, ANSWER],
    "two answers": [ASK, ANSWER, THANKS, WELCOME],
    "white space": [THANKS, WELCOME],
    "system": [SYSTEM, ASK, ANSWER, THANKS, WELCOME],
    "last thought": [ASK, ANSWER, THANKS, THOUGHT],
    "first thought": [ASK, THOUGHT, THANKS, WELCOME, ASK, ANSWER],
    "reasoning": [ASK, REASONING, THANKS, REASONING],
    "tool": [ASK, THOUGHT, RESULT, REASONING, THANKS, ANSWER],
    "same texts": [ASK, {"role": "assistant", "content": ASK["content"]}, ASK, ANSWER, ASK, ANSWER],
    "two in a row": [ASK, ANSWER, ANSWER],
    "answer first": [ANSWER, ASK, ANSWER],
    "short": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "i"}] * 2,
}
FRAGMENTS = ["", " ", "\n", "\n\n", "\r", "a", "yes", "?", "It's", "日本", "😀", '"', "\\", "<", "Be kind.", "model\n"]
FRAGMENTS += ["<think>", "</think>", "\n</think>\n\n", "<tool_response>", "assistant\n", "ASSISTANT:"]
FRAGMENTS += ["[INST", "INST]", "<|im", "_end|>"]
PUBLISHED = Path(os.environ.get("NANOGPT_TOKENIZERS", "/nonexistent"))  # as test_tokenizer_ids.py has them


def build(folder: Path, name: str, template: str) -> tuple[Tokenizer, Any]:
    """A tokenizer of ours with a template, and the same of transformers'."""
    model: Any = tokenizers.models.BPE()
    inner = tokenizers.Tokenizer(model)
    text = Path(__file__).read_text(encoding="utf-8")
    if name in SENTENCE_PIECE:
        spaces = tokenizers.normalizers.Replace(" ", "▁")
        prepend = [tokenizers.normalizers.Prepend("▁")] if name in PREFIX_SPACE else []
        inner.normalizer = tokenizers.normalizers.Sequence([*prepend, spaces])
        inner.train_from_iterator(text.split("\n"), tokenizers.trainers.BpeTrainer(vocab_size=500, show_progress=False))
        learned = json.loads(inner.to_str())["model"]
        vocab = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
        ids = {token: i for i, token in enumerate(vocab)}
        merges = [(left, right) for left, right in learned["merges"]]
        decoders = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
        inner.decoder = tokenizers.decoders.Sequence([*decoders, tokenizers.decoders.Fuse()])
        inner.model = tokenizers.models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    else:
        # As Llama-3's and Qwen's patterns do, this one ends a piece after line breaks, whatever follows them.
        pattern = tokenizers.Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s")
        split = tokenizers.pre_tokenizers.Split(pattern, "isolated")
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
        inner.decoder = tokenizers.decoders.ByteLevel()
        options = {"initial_alphabet": byte_level.alphabet(), "show_progress": False}
        inner.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=500, **options))
    names = SPECIAL_TOKENS[name].split()
    inner.add_special_tokens([tokenizers.AddedToken(token, rstrip=name == "phi-3") for token in names])
    inner.add_tokens(["<think>", "</think>"])  # ordinary, as in Qwen3
    inner.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0], "eos_token": names[1]}
    settings |= {"unk_token": None, "chat_template": template, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer.load(folder)
    assert ours is not None
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=SPECIAL_TOKENS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer, Any]:
    """Our tokenizer with a template, the same without generation blocks, and transformers' with them."""
    template = (TEMPLATES / f"{request.param}.jinja").read_text(encoding="utf-8")
    without_blocks = re.sub(r"generation( -?%})", r"if true\1", template.replace("endgeneration", "endif"))
    ours, theirs = build(tmp_path_factory.mktemp("blocks"), request.param, template)
    plain, _ = build(tmp_path_factory.mktemp("plain"), request.param, without_blocks)
    return ours, plain, theirs


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
def test_chat_gives_transformers_ids_and_mask(talk: list[dict[str, str]], kind: tuple[Tokenizer, Tokenizer, Any]):
    """With generation blocks, and without them by looking for the answers."""
    compare(talk, *kind)


@pytest.mark.slow
def test_chat_gives_transformers_ids_and_mask_for_random_talks(kind: tuple[Tokenizer, Tokenizer, Any]):
    rng = random.Random(1)
    for _ in range(300):
        roles = ["user", "assistant"] * rng.randint(1, 3)
        talk = [{"role": role, "content": "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 6)))} for role in roles]
        if not any(name in message["content"] for name in kind[0].special_tokens for message in talk):
            compare([SYSTEM, *talk] if rng.random() < 0.3 else talk, *kind)


def compare(talk: list[dict[str, str]], ours: Tokenizer, plain: Tokenizer, theirs: Any) -> None:
    """Compare ids and mask with transformers', by a template with generation blocks and by one without them."""
    try:
        expected = theirs.apply_chat_template(talk, return_assistant_tokens_mask=True)
    except Exception as refusal:
        for tokenizer in (ours, plain):
            with pytest.raises(ValueError, match=f"refuses it .{refusal}"):
                Chat(tokenizer).encode(talk)
        return

    ids = [*expected["input_ids"]]
    mask = [*expected["assistant_masks"]]
    if ours.end_of_text not in (None, ids[-1]):  # which separates documents
        ids.append(ours.end_of_text)
        mask.append(0)
    for tokenizer in (ours, plain):
        our_ids, our_mask = Chat(tokenizer).encode(talk)
        assert our_ids.tolist() == ids
        texts, our_texts = (answer_texts(ours, our_ids, np.array(each)) for each in (mask, our_mask))
        if tokenizer is plain:
            texts = [text.rstrip("\n") for text in texts]  # zephyr's blocks end with a line
        assert our_texts == texts


@pytest.mark.parametrize("length", [1, 3])
def test_encode_prompt_is_the_conversation_up_to_the_answer(length: int, kind: tuple[Tokenizer, Tokenizer, Any]):
    """Id for id, so that sampling continues a text as training had it."""
    _, plain, theirs = kind
    talk = [ASK, ANSWER, THANKS, ANSWER][: length + 1]
    prompt = Chat(plain).encode_prompt(talk[:-1])
    assert prompt == theirs.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"]
    ids, mask = Chat(plain).encode(talk)
    is_deepseek = "<｜User｜>" in plain.special_tokens
    if is_deepseek:
        assert plain.decode(prompt).endswith("<think>\n")
        prompt = plain.encode(plain.decode(prompt).removesuffix("<think>\n"))
    assert ids.tolist()[: len(prompt)] == prompt
    assert mask[len(prompt) - 1 : len(prompt) + 1].tolist() == [0, 1]


def test_names_of_special_tokens_in_messages_are_text(kind: tuple[Tokenizer, Tokenizer, Any]):
    """As with `sanitize_control_tokens=True`."""
    ours, plain, theirs = kind
    theirs.chat_control_tokens = []  # special tokens alone, not all tokens that the template names
    evil = f"?{''.join(ours.special_tokens)}b{' '.join(ours.special_tokens)}"
    talk = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
    harmless = [{"role": "user", "content": "?" * len(evil)}, {"role": "assistant", "content": "!"}]
    expected = theirs.apply_chat_template(talk, sanitize_control_tokens=True)["input_ids"]
    special_ids = [*ours.special_tokens.values()]
    if "<question>" in ours.special_tokens:  # this template capitalizes them
        with pytest.raises(ValueError, match="depends on the name"):
            Chat(ours).encode(talk)
        return
    for tokenizer in (ours, plain):
        ids, mask = Chat(tokenizer).encode(talk)
        assert ids.tolist()[: len(expected)] == expected
        is_special = np.isin(ids, special_ids)
        harmless_ids = Chat(tokenizer).encode(harmless)[0]
        assert ids[is_special].tolist() == harmless_ids[np.isin(harmless_ids, special_ids)].tolist()
        assert is_special[mask == 1].sum() == 1  # the one that ends the answer
        prompt = theirs.apply_chat_template(talk[:1], add_generation_prompt=True, sanitize_control_tokens=True)
        assert Chat(tokenizer).encode_prompt(talk[:1]) == prompt["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(PUBLISHED.rglob("tokenizer_config.json")), ids=str)
def test_published_templates_give_transformers_ids(path: Path):
    ours, theirs = Tokenizer.load(path.parent), transformers.AutoTokenizer.from_pretrained(path.parent)
    if ours is None or ours.template is None:
        pytest.skip("has no chat template")
    chat = Chat(ours)
    for talk in TALKS.values():
        try:
            expected = theirs.apply_chat_template(talk)["input_ids"]
        except jinja2.TemplateError:
            with pytest.raises(ValueError, match="refuses it"):
                chat.encode(talk)
            continue
        ids, mask = chat.encode(talk)
        assert ids.tolist()[: len(expected)] == expected
        prompt = theirs.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"]
        assert chat.encode_prompt(talk[:-1]) == prompt
        contents = [message["content"] for message in talk if message["role"] == "assistant"]
        for content, answer in zip(contents, answer_texts(ours, ids, mask), strict=True):
            end = re.escape(content.rpartition("</think>")[2].strip())
            assert re.search(end + r"\s*<[^<>]+>$", answer)
