"""Conversations in tokens, by a chat template: which text and which special tokens stand around each message.

A template is Jinja, as Hugging Face's models bring one along. It travels beside tokenizer.json, as
`chat_template.jinja`.
"""

import datetime
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from nanogpt.errors import InputError
from nanogpt.text.tokenizer import END_OF_TEXT, TURNS, Tokenizer

Messages = Sequence[dict[str, str]]  # each with its role and its content
NAMES = ("role", "reasoning_content", "content")
# For tokenizers that bring none along: with tokens for turns as Qwen's models have them, and without.
WITH_TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{{ message.content }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize + ':\\n' }}{{ message.content }}"
    "{{ '<|endoftext|>' if message.role == 'assistant' }}{{ '\\n\\n' if not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:\\n' }}{% endif %}\n"
)
_MARK = re.compile("\ue000([0-9]+)([cr])\ue001")  # stands for a message's content, or reasoning, while a template works


def template_for(tokenizer: Tokenizer) -> str:
    """The tokenizer's own template, or one of ours. Raises InputError where no token could end an answer."""
    if tokenizer.template is not None:
        return tokenizer.template
    if all(turn in tokenizer.special_tokens for turn in TURNS):
        return WITH_TURNS
    if END_OF_TEXT not in tokenizer.special_tokens:
        raise InputError(
            f"the {tokenizer.name} tokenizer has no {END_OF_TEXT} to end an answer with: prepare conversations with "
            "--tokenizer=gpt2, byte, bpe:8192, or that of the model to be tuned"
        )
    return PLAIN


def turns(row: Any) -> list[dict[str, str]]:
    """The messages of a row: its `messages`, or `prompt` and `completion`, each a text or a list of messages.

    Raises ValueError for what is no conversation, and for one without an answer.
    """
    if not isinstance(row, dict):
        raise ValueError("no object with messages, or with prompt and completion")
    told = row.get("messages")
    if told is None:
        told = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            if row.get(name) is None:
                raise ValueError(f"has neither messages nor {name}, but {', '.join(map(str, row)) or 'nothing'}")
            told += row[name] if isinstance(row[name], list) else [{"role": role, "content": row[name]}]
    if not isinstance(told, list):
        raise ValueError("messages is no list")
    messages = []
    for number, message in enumerate(told, 1):
        message = message if isinstance(message, dict) else {}
        texts = {name: message[name] for name in NAMES if isinstance(message.get(name), str)}
        if message.get("tool_calls"):
            raise ValueError(f"message {number} calls a tool, which is not supported")
        if "content" not in texts or not re.fullmatch(r"\w+", texts.get("role", "")):
            raise ValueError(f"message {number} has no role and content that are text")
        messages.append(texts)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no message of the assistant, so nothing to learn")
    return messages


class Chat:
    """Conversations in a tokenizer's ids, by its template."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises InputError where the tokenizer has no template, or a broken one."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if tokenizer.template is None:
            raise InputError(
                "the tokenizer has no chat template: the model was not tuned on conversations, which "
                "`python data/prepare.py --chat=True` prepares"
            )
        self.tokenizer = tokenizer
        # These settings, names and the tag {% generation %} are those that transformers gives to templates.
        house = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        house.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        house.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }
        try:
            self._template = house.from_string(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", tokenizer.template))
        except TemplateError as error:
            raise InputError(f"the tokenizer's chat template is broken ({error}): restore it") from error
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def encode(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """A conversation's ids, uint32 (tokens,), and a loss mask, uint8: 1 for the answers, each with the special
        token that ends it. The end of text comes last.

        Raises ValueError where the template refuses the conversation or does not end its answers.
        """
        ids, mask = self._encode(messages, self._render(messages))
        if not mask.any():
            raise ValueError("the chat template leaves the answers out")
        end = self.tokenizer.end_of_text
        if end is not None and ids[-1] != end:
            ids, mask = np.append(ids, np.uint32(end)), np.append(mask, np.uint8(0))
        return ids, mask

    def prompt(self, messages: Messages) -> list[int]:
        """The ids of a conversation up to where the next answer begins. Raises ValueError as `encode`."""
        return self._encode(messages, self._render(messages, add_generation_prompt=True))[0].tolist()

    @cached_property
    def ends(self) -> frozenset[int]:
        """The ids that end an answer."""
        ids, mask = self.encode([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
        ends = {int(ids[np.flatnonzero(mask)[-1]]), self.tokenizer.end_of_text}
        return frozenset(end for end in ends if end is not None)

    @cached_property
    def _header(self) -> str:
        """What a template puts before an answer that is to come."""
        asked = [{"role": "user", "content": "?"}]
        return self._render(asked, add_generation_prompt=True).removeprefix(self._render(asked))

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The template's text with marks for the contents, which it can then neither change nor take for its own."""
        marked = []
        for i, message in enumerate(messages):
            marked.append({"role": message["role"], "content": f"\ue000{i}c\ue001"})
            if "reasoning_content" in message:
                marked[-1]["reasoning_content"] = f"\ue000{i}r\ue001"
        try:
            return self._template.render(
                messages=marked, add_generation_prompt=add_generation_prompt, bos_token="", eos_token=""
            )
        except Exception as error:  # whatever a template happens to do
            raise ValueError(f"the chat template refuses it ({' '.join(str(error).split())[:200]})") from error

    def _encode(self, messages: Messages, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of a rendered text. What is counted is encoded apart from what stands before it, as in sampling;
        else texts that touch are encoded together, as if the template had been filled in."""
        joined: list[tuple[str | int, bool]] = []  # a text or the id of a special token, and whether it counts

        def add(text: str, counts: bool) -> None:
            if text and joined and isinstance(joined[-1][0], str) and joined[-1][1] == counts:
                joined[-1] = (joined[-1][0] + text, counts)
            elif text:
                joined.append((text, counts))

        def add_template(text: str, counts: bool) -> None:
            at = 0
            for found in self._special.finditer(text):
                add(text[at : found.start()], counts)
                joined.append((self.tokenizer.special_tokens[found[0]], counts))
                at = found.end()
            add(text[at:], counts)

        at, answers = 0, -1  # the message whose answer is being counted, or -1
        for mark in [*_MARK.finditer(text), None]:
            between = text[at : mark.start() if mark else len(text)]
            number = int(mark[1]) if mark else -1
            if answers >= 0 and number != answers:
                end = self._special.search(between)
                if not end:
                    raise ValueError("the chat template ends an answer with no special token")
                add_template(between[: end.end()], True)
                between, answers = between[end.end() :], -1
            if answers < 0 and number >= 0 and messages[number]["role"] == "assistant":
                begins = between.rfind(self._header) + len(self._header) if self._header in between else len(between)
                add_template(between[:begins], False)
                between, answers = between[begins:], number
            add_template(between, answers >= 0)
            if mark:
                add(messages[number]["content" if mark[2] == "c" else "reasoning_content"], answers >= 0)
                at = mark.end()
        ids = [
            self.tokenizer.encode_ordinary(part) if isinstance(part, str) else np.array([part], dtype=np.uint32)
            for part, _ in joined
        ]
        mask = [np.full(len(part), counts, dtype=np.uint8) for part, (_, counts) in zip(ids, joined, strict=True)]
        return np.concatenate(ids), np.concatenate(mask)


def _refuse(why: str) -> None:
    raise ValueError(why)
