"""Conversations as tokens, by a chat template: the text and special tokens around each message.

A template is Jinja, as Hugging Face's models have it, in `chat_template.jinja` beside tokenizer.json. A conversation is
rendered and encoded as a whole, so that its ids are those of transformers' `apply_chat_template`. One thing differs: a
message that holds the name of a special token never becomes that token (`sanitize_control_tokens=True` there).
"""

import contextlib
import datetime
import json
import re
from bisect import bisect_left
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from nanogpt.errors import InputError
from nanogpt.text.tokenizer import CHATML_TOKENS, END_OF_TEXT, Tokenizer, replace_surrogates

if TYPE_CHECKING:
    import jinja2

Messages = Sequence[dict[str, str]]  # each with a role and a content
CONTENT_KEYS = ("reasoning_content", "content")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # of which transformers takes the first
ROLES = ("system", "developer", "user", "assistant", "tool")  # which may be part of a special token's name
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
# Unicode's noncharacters, which no text has, mark places in a rendered text.
NAME_START, NAME_END = "\ufdd0", "\ufdd1"  # around a special token's name in a message
BLOCK_EDGE = "\ufdd2"  # where {% generation %} begins and ends
PROBE = "\ufdd3"  # takes the place of an answer, to find where that is
MARKS = re.compile(f"[{NAME_START}{NAME_END}{BLOCK_EDGE}{PROBE}]")


def template_for(tokenizer: Tokenizer) -> str:
    """The tokenizer's own template, or one of ours. Raises InputError if no token could end an answer."""
    if tokenizer.template is not None:
        return tokenizer.template
    if all(token in tokenizer.special_tokens for token in CHATML_TOKENS):
        return CHATML_TEMPLATE
    if tokenizer.end_of_text is None:
        raise InputError(
            f"the {tokenizer.name} tokenizer has no {END_OF_TEXT} to end an answer with: prepare conversations with "
            "--tokenizer=gpt2, byte, bpe:8192, or that of the model to fine-tune"
        )
    return PLAIN_TEMPLATE.replace(END_OF_TEXT, tokenizer.decode([tokenizer.end_of_text]))


def parse_messages(row: Any) -> list[dict[str, str]]:
    """The messages of a row: its `messages`, or `prompt` and `completion`, each a text or a list of messages.

    Raises ValueError if they are not a conversation, or have no answer.
    """
    if not isinstance(row, dict):
        raise ValueError("is not an object with messages, or with prompt and completion")
    if row.get("tools") not in (None, "", "[]", [], {}):
        raise ValueError("has tools, which are not supported")
    entries = row.get("messages")
    if entries is None:
        entries = []
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            if row.get(key) is None:
                keys = ", ".join(map(str, row)) or "nothing"
                hint = ": docs/data.md converts it" if row.keys() & {"conversations", "instruction"} else ""
                raise ValueError(f"has neither messages nor {key}, but {keys}{hint}")
            entries += row[key] if isinstance(row[key], list) else [{"role": role, "content": row[key]}]
    messages = check_messages(entries)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no message of the assistant, so nothing to learn")
    return messages


def check_messages(entries: Any) -> list[dict[str, str]]:
    """The roles and contents in a list of messages. Raises ValueError for anything else."""
    if not isinstance(entries, list):
        raise ValueError("messages is not a list")

    messages = []
    for number, entry in enumerate(entries, 1):
        fields = entry if isinstance(entry, dict) else {}
        if fields.get("tool_calls"):
            raise ValueError(f"message {number} calls a tool, which is not supported")
        message = {key: fields[key] for key in ("role", "content") if isinstance(fields.get(key), str)}
        reasoning = next((fields[key] for key in REASONING_KEYS if isinstance(fields.get(key), str)), None)
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        if "content" not in message or not re.fullmatch(r"\w+", message.get("role", "")):
            raise ValueError(f"message {number} has no role and content that are text")
        messages.append(message)
    return messages


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a generated text: the `eos_token`, that of a document, and of a chat model also of an answer."""
    ends = [tokenizer.named_id("eos_token"), tokenizer.end_of_text]
    if tokenizer.template is not None:
        with contextlib.suppress(InputError):  # a template that needs more than a question and an answer
            ends += sorted(Chat.for_answers(tokenizer).stop_ids)
    return list(dict.fromkeys(end for end in ends if end is not None))


class Chat:
    """Encodes conversations with a tokenizer and its chat template.

    end_ids: ids that end an answer, beside those of the template and the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int] = ()):
        """Raises InputError if the tokenizer has no template, or a broken one."""
        from jinja2 import TemplateError

        if tokenizer.template is None:
            raise InputError(
                "the tokenizer has no chat template: the model was not fine-tuned on conversations, which "
                "`python data/prepare.py --chat=True` prepares"
            )
        try:
            self._template = _make_environment().from_string(tokenizer.template)
        except TemplateError as error:
            raise InputError(f"the tokenizer's chat template is broken ({error}): restore it") from error
        self._has_blocks = re.search(r"{%-?\s*generation\s*-?%}", tokenizer.template) is not None
        self.tokenizer = tokenizer
        self.end_ids = end_ids

        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        names = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._name = re.compile(f"({names})")
        self._marked_name = re.compile(f"{NAME_START}({names}){NAME_END}")
        self._token_or_mark = re.compile(f"{names}|{NAME_START}")

    @classmethod
    def for_answers(cls, tokenizer: Tokenizer, end_ids: Collection[int] = ()) -> "Chat":
        """A Chat whose `stop_ids` are known. Raises InputError also for a template that does not end an answer."""
        chat = cls(tokenizer, end_ids)
        try:
            chat.stop_ids  # noqa: B018  # computed once
        except ValueError as error:
            raise InputError(f"{error}: restore the template that the model was tuned with") from error
        return chat

    def encode(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, uint32 (tokens,), and its loss mask, uint8 (tokens,).

        The mask is 1 for the text in {% generation %} blocks; if the template has none, for the answers, each with the
        special token that ends it. The end of text comes last. Raises ValueError if the template refuses the
        conversation, does not end its answers, or changes them so that their places are not certain.
        """
        messages, text = self._fill_in(messages)
        ids, spans = self._tokenize(text)
        mask = np.zeros(len(ids), dtype=np.uint8)
        for start, end in self._find_blocks(messages, text) if self._has_blocks else self._find_answers(messages, text):
            mask[(spans[:, 1] > start) & (spans[:, 0] < end)] = 1
        if not mask.any():
            raise ValueError("the chat template leaves the answers out")

        end_of_text = self.tokenizer.end_of_text
        if end_of_text is not None and ids[-1] != end_of_text:
            ids = np.append(ids, np.uint32(end_of_text))
            mask = np.append(mask, np.uint8(0))
        return ids, mask

    def encode_prompt(self, messages: Messages) -> list[int]:
        """The ids of a conversation up to the start of the next answer. Raises ValueError as `encode`."""
        _, text = self._fill_in(messages, add_generation_prompt=True)
        return self._tokenize(text)[0].tolist()

    def encode_recent(self, messages: Messages, context: int) -> tuple[list[int], int]:
        """Ids as of `encode_prompt`, without the oldest messages if all take more than half of the context.

        Questions and answers are left out in pairs; system messages at the start and the last question are kept.
        context: in tokens. Returns the ids, and the number of messages left out. Raises InputError for a conversation
        that the template refuses, or that is too long all the same.
        """
        is_turn = [message["role"] not in ("system", "developer") for message in messages]
        first = is_turn.index(True) if True in is_turn else 0

        def encode_without(pairs: int) -> list[int]:
            return self.encode_prompt([*messages[:first], *messages[first + 2 * pairs :]])

        try:
            most_pairs = max(0, len(messages) - first - 1) // 2
            pairs = bisect_left(range(most_pairs), True, key=lambda n: len(encode_without(n)) <= context // 2)
            ids = encode_without(pairs)
        except ValueError as error:
            raise InputError(
                f"{error}; change the messages, or use the template that the model was tuned with"
            ) from error
        if len(ids) > context:
            raise InputError(
                f"the question, as the chat template writes it, has {len(ids):,} tokens, more than the context of "
                f"{context:,}; shorten it"
            )
        return ids, 2 * pairs

    def encode_answer(self, text: str) -> list[int]:
        """The ids of the beginning of an answer, which follow those of the prompt. Raises ValueError as `encode`."""
        parts = self._name.split(replace_surrogates(text))  # text, name, text, …
        return np.concatenate(
            [self._encode_part(part, number % 2 == 1)[0] for number, part in enumerate(parts)]
        ).tolist()

    def count_changed(self, messages: Messages) -> int:
        """The number of contents that the template leaves out or changes, but for white space around them."""
        text = self._render(messages)
        contents = [message[key].strip() for message in messages for key in CONTENT_KEYS if key in message]
        return sum(content not in text for content in contents)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer. Raises ValueError as `encode`."""
        messages, text = self._fill_in([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
        answers = self._find_answers(messages, text)
        if not answers:
            raise ValueError("the chat template leaves the answers out")
        start, end = answers[0]
        last_of_answer = self.tokenizer.special_tokens[self._name.findall(text[start:end])[-1]]
        ends = (last_of_answer, self.tokenizer.named_id("eos_token"), self.tokenizer.end_of_text)
        return frozenset(end for end in ends if end is not None).union(self.end_ids)

    def _fill_in(self, messages: Messages, add_generation_prompt: bool = False) -> tuple[Messages, str]:
        """The messages with marks around the names of special tokens in them, and the template's text with these.

        Without the marks it is the text that the messages as they are would give.
        """
        plain, marked = [], []
        for message in messages:
            role = message["role"]
            if role not in ROLES and any(role in name for name in self.tokenizer.special_tokens):
                raise ValueError(f"the role {role!r} is part of the name of a special token")  # such as <|endoftext|>
            contents = {key: replace_surrogates(message[key]) for key in CONTENT_KEYS if key in message}
            if any(map(MARKS.search, contents.values())):
                raise ValueError("a message holds one of Unicode's noncharacters U+FDD0 to U+FDD3")
            plain.append({"role": role, **contents})
            names_marked = {key: self._name.sub(rf"{NAME_START}\1{NAME_END}", contents[key]) for key in contents}
            marked.append({"role": role, **names_marked})

        text = self._render(marked, add_generation_prompt)
        if marked != plain and self._marked_name.sub(r"\1", text) != self._render(plain, add_generation_prompt):
            raise ValueError("the chat template depends on the name of a special token in a message")
        return marked, text

    def _render(self, messages: Messages, add_generation_prompt: bool = False, **variables: str) -> str:
        with_thinking = [
            {"thinking": message["reasoning_content"], **message} if "reasoning_content" in message else message
            for message in messages
        ]
        try:
            return self._template.render(
                messages=with_thinking,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.named_tokens,
                **variables,
            )
        except Exception as error:  # a template can raise anything
            raise ValueError(f"the chat template refuses it ({' '.join(str(error).split())[:200]})") from error

    def _tokenize(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (tokens,) of a rendered text, and where in it each begins and ends, (tokens, 2)."""
        first, *others = self._marked_name.split(text)  # text, name, text, …
        ids, spans = self.tokenizer.encode_with_spans(first)
        all_ids, all_spans = [ids], [spans]
        position = len(first)
        for number, part in enumerate(others):
            is_name = number % 2 == 0
            position += is_name  # a mark
            ids, spans = self._encode_part(part, is_name)
            all_ids.append(ids)
            all_spans.append(spans + position)
            position += len(part) + is_name
        return np.concatenate(all_ids), np.concatenate(all_spans)

    def _encode_part(self, text: str, is_name: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids and spans of a text that follows another; the name of a special token as plain text."""
        newline, _ = self.tokenizer.encode_with_spans("\n")
        # Encoded after a newline, because some tokenizers add a space to the start of a text.
        ids, spans = self.tokenizer.encode_with_spans("\n" + text, ordinary=is_name)
        if np.array_equal(ids[: len(newline)], newline):
            ids, spans = ids[len(newline) :], spans[len(newline) :] - 1
        else:
            ids, spans = self.tokenizer.encode_with_spans(text, ordinary=is_name)
        if is_name and self.tokenizer.special_tokens[text] in ids:
            raise ValueError(f"a message holds {text}, for which the tokenizer has no plain tokens")
        return ids, spans

    def _find_blocks(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """Where the {% generation %} blocks of a rendered text begin and end."""
        pieces = self._render(messages, block_edge=BLOCK_EDGE).split(BLOCK_EDGE)
        if "".join(pieces) != text:
            raise ValueError("the chat template changes the text of its generation blocks")
        edges = np.cumsum([len(piece) for piece in pieces]).tolist()
        return list(zip(edges[0:-1:2], edges[1::2], strict=True))

    def _find_answers(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """Where the answers of a rendered text begin and end, with the special tokens that end them."""
        answers: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                answer = self._find_answer(messages, text, i, answers[-1][1] if answers else 0)
                answers += [answer] if answer else []
        return answers

    def _find_answer(self, messages: Messages, text: str, i: int, earliest: int) -> tuple[int, int] | None:
        """Where the answer messages[i] begins and ends; None if the template leaves it out.

        It begins after the last text before its content that asks for an answer, and ends with the first special token
        after its content.
        """
        # Where the text changes if its content does.
        replaced = {key: PROBE for key in CONTENT_KEYS if key in messages[i]}
        other = self._render([*messages[:i], {**messages[i], **replaced}, *messages[i + 1 :]])
        first = _shared_length(text, other)
        last = max(first, len(text) - _shared_length(text[::-1], other[::-1]))
        changed = other[first : len(other) - len(text) + last]

        header, lead = self._before_answers
        header_start = text.rfind(header, earliest, first) if header else -1
        if header_start >= 0:
            start = header_start + len(header)
        else:
            start = first - len(lead) if text.endswith(lead, earliest, first) else first
        if first == last and changed != PROBE and (header_start < 0 or start < first):
            return None  # it is empty, and the template has no text for it either

        end = self._token_or_mark.search(text, last)
        if not end or end.group() == NAME_START:
            raise ValueError("the chat template ends an answer with no special token")
        is_plain = changed == PROBE and not text[last : end.start()].strip()
        if not is_plain and (PROBE not in changed or self._find_content(messages, text, i + 1) < end.end()):
            raise ValueError("the chat template does not show where an answer ends")
        return start, end.end()

    def _find_content(self, messages: Messages, text: str, i: int) -> int:
        """Where a rendered text changes if the middle of the content of messages[i] does."""
        if i == len(messages):
            return len(text)
        content = messages[i]["content"]
        middle = len(content) // 2
        replaced = {"content": content[:middle] + PROBE + content[middle:]}
        return _shared_length(text, self._render([*messages[:i], {**messages[i], **replaced}, *messages[i + 1 :]]))

    @cached_property
    def _before_answers(self) -> tuple[str, str]:
        """The template's text that asks for an answer, and its text between there and the content of the answer."""
        question = {"role": "user", "content": "?"}
        prompt = self._render([question], add_generation_prompt=True)
        header = prompt.removeprefix(self._render([question]))
        text = self._render([question, {"role": "assistant", "content": PROBE}])
        lead = text[len(prompt) : text.find(PROBE)] if text.startswith(prompt) else ""
        return header, lead


def _shared_length(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    # By bisection, which compares long texts faster than a loop over characters.
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect_left(lengths, True, key=lambda length: one[:length] != other[:length])


def _make_environment() -> "jinja2.Environment":
    """An environment with the settings, functions and tag {% generation %} that transformers gives to templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}, with the variable `block_edge` before and after."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            edges = [nodes.Output([nodes.Name("block_edge", "load")], lineno=line) for _ in range(2)]
            return [edges[0], nodes.Scope(body, lineno=line), edges[1]]

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = datetime.datetime.now().strftime
    return env


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)
