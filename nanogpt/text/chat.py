"""Conversations as tokens, by a chat template: the text and special tokens around each message.

A template is Jinja, as Hugging Face's models have it, in `chat_template.jinja` beside tokenizer.json.
"""

import datetime
import itertools
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from nanogpt.errors import InputError
from nanogpt.text.tokenizer import CHATML_TOKENS, END_OF_TEXT, Tokenizer

Messages = Sequence[dict[str, str]]  # each with a role and a content
CONTENT_KEYS = ("reasoning_content", "content")
# For tokenizers without a template of their own: with ChatML's special tokens (as Qwen's models have them) and without.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{{ message.content }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize + ':\\n' }}{{ message.content }}"
    "{{ '<|endoftext|>' if message.role == 'assistant' }}{{ '\\n\\n' if not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:\\n' }}{% endif %}\n"
)
# Stands for a message's content while the template renders: the number of the message and a key.
_PLACEHOLDER = re.compile(f"\ue000([0-9]+):({'|'.join(CONTENT_KEYS)})\ue001")


def template_for(tokenizer: Tokenizer) -> str:
    """The tokenizer's own template, or one of ours. Raises InputError if no token could end an answer."""
    if tokenizer.template is not None:
        return tokenizer.template
    if all(token in tokenizer.special_tokens for token in CHATML_TOKENS):
        return CHATML_TEMPLATE
    if END_OF_TEXT not in tokenizer.special_tokens:
        raise InputError(
            f"the {tokenizer.name} tokenizer has no {END_OF_TEXT} to end an answer with: prepare conversations with "
            "--tokenizer=gpt2, byte, bpe:8192, or that of the model to fine-tune"
        )
    return PLAIN_TEMPLATE


def parse_messages(row: Any) -> list[dict[str, str]]:
    """The messages of a row: its `messages`, or `prompt` and `completion`, each a text or a list of messages.

    Raises ValueError if they are not a conversation, or have no answer.
    """
    if not isinstance(row, dict):
        raise ValueError("is not an object with messages, or with prompt and completion")
    entries = row.get("messages")
    if entries is None:
        entries = []
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            if row.get(key) is None:
                raise ValueError(f"has neither messages nor {key}, but {', '.join(map(str, row)) or 'nothing'}")
            entries += row[key] if isinstance(row[key], list) else [{"role": role, "content": row[key]}]
    if not isinstance(entries, list):
        raise ValueError("messages is not a list")

    messages = []
    for number, entry in enumerate(entries, 1):
        fields = entry if isinstance(entry, dict) else {}
        if fields.get("tool_calls"):
            raise ValueError(f"message {number} calls a tool, which is not supported")
        message = {key: fields[key] for key in ("role", *CONTENT_KEYS) if isinstance(fields.get(key), str)}
        if "content" not in message or not re.fullmatch(r"\w+", message.get("role", "")):
            raise ValueError(f"message {number} has no role and content that are text")
        messages.append(message)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no message of the assistant, so nothing to learn")
    return messages


class Chat:
    """Encodes conversations with a tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises InputError if the tokenizer has no template, or a broken one."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if tokenizer.template is None:
            raise InputError(
                "the tokenizer has no chat template: the model was not fine-tuned on conversations, which "
                "`python data/prepare.py --chat=True` prepares"
            )
        self.tokenizer = tokenizer

        # The same settings, functions and tag {% generation %} as transformers gives to templates.
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        env.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", tokenizer.template)
        try:
            self._template = env.from_string(source)
        except TemplateError as error:
            raise InputError(f"the tokenizer's chat template is broken ({error}): restore it") from error

        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special_token = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, uint32 (tokens,), and its loss mask, uint8 (tokens,).

        The mask is 1 for the answers, each with the special token that ends it. The end of text comes last.
        Raises ValueError if the template refuses the conversation or does not end its answers.
        """
        ids, mask = self._encode(messages, self._render(messages))
        if not mask.any():
            raise ValueError("the chat template leaves the answers out")
        end = self.tokenizer.end_of_text
        if end is not None and ids[-1] != end:
            ids = np.append(ids, np.uint32(end))
            mask = np.append(mask, np.uint8(0))
        return ids, mask

    def encode_prompt(self, messages: Messages) -> list[int]:
        """The ids of a conversation up to the start of the next answer. Raises ValueError as `encode`."""
        return self._encode(messages, self._render(messages, add_generation_prompt=True))[0].tolist()

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer."""
        ids, mask = self.encode([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
        last_of_answer = int(ids[np.flatnonzero(mask)[-1]])
        end = self.tokenizer.end_of_text
        return frozenset([last_of_answer] if end is None else [last_of_answer, end])

    @cached_property
    def _answer_header(self) -> str:
        """The template's text before an answer that is to be generated."""
        question = [{"role": "user", "content": "?"}]
        return self._render(question, add_generation_prompt=True).removeprefix(self._render(question))

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The template's text with placeholders for contents, which it thus can neither change nor interpret."""
        placeholders = []
        for i, message in enumerate(messages):
            contents = {key: f"\ue000{i}:{key}\ue001" for key in CONTENT_KEYS if key in message}
            placeholders.append({"role": message["role"], **contents})
        try:
            return self._template.render(
                messages=placeholders, add_generation_prompt=add_generation_prompt, bos_token="", eos_token=""
            )
        except Exception as error:  # a template can raise anything
            raise ValueError(f"the chat template refuses it ({' '.join(str(error).split())[:200]})") from error

    def _encode(self, messages: Messages, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and loss mask of a rendered text.

        Answers are encoded apart from the text before them, as in sampling. Other neighboring texts are encoded
        together, as if the template had been filled in.
        """
        parts: list[tuple[str | int, bool]] = []  # a text or the id of a special token; is it part of an answer?

        def add(part: str | int, is_answer: bool) -> None:
            if isinstance(part, str) and parts and isinstance(parts[-1][0], str) and parts[-1][1] == is_answer:
                parts[-1] = (parts[-1][0] + part, is_answer)
            elif part != "":
                parts.append((part, is_answer))

        def add_template(text: str, is_answer: bool) -> None:
            for piece in self._special_token.split(text):
                add(self.tokenizer.special_tokens.get(piece, piece), is_answer)

        pieces = _PLACEHOLDER.split(text)  # text, message number, content key, text, …
        answer = None  # the number of the message whose answer is open
        for between, number, key in itertools.zip_longest(pieces[0::3], pieces[1::3], pieces[2::3]):
            if answer is not None and number != answer:  # the answer ends with the next special token
                end = self._special_token.search(between)
                if not end:
                    raise ValueError("the chat template ends an answer with no special token")
                add_template(between[: end.end()], True)
                between = between[end.end() :]
                answer = None
            if answer is None and number and messages[int(number)]["role"] == "assistant":  # the next answer begins
                header = self._answer_header
                start = between.rindex(header) + len(header) if header in between else len(between)
                add_template(between[:start], False)
                between = between[start:]
                answer = number

            add_template(between, answer is not None)
            if number:
                add(messages[int(number)][key], answer is not None)

        ids, mask = [], []
        for part, is_answer in parts:
            ids.append(self.tokenizer.encode_ordinary(part) if isinstance(part, str) else np.array([part], np.uint32))
            mask.append(np.full(len(ids[-1]), is_answer, dtype=np.uint8))
        return np.concatenate(ids), np.concatenate(mask)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)
