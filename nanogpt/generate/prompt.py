"""Encode a prompt, or a conversation, that a model continues."""

from collections.abc import Sequence
from typing import Any

from nanogpt.errors import InputError
from nanogpt.text.chat import Chat, Messages
from nanogpt.text.tokenizer import Tokenizer


def encode_prompt(prompt: str, model: Any, tokenizer: Tokenizer) -> list[int]:
    """Encode a text. Raises InputError for an empty one, or one that does not fit the model."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("the prompt is empty")
    check_ids(ids, model, tokenizer)
    block_size = model.config.block_size
    if len(ids) > block_size:
        raise InputError(f"the prompt has {len(ids):,} tokens, more than the context of {block_size:,}; shorten it")
    return ids


def encode_conversation(messages: Messages, model: Any, chat: Chat) -> tuple[list[int], Messages]:
    """Encode a conversation up to where the next answer begins. Returns the ids, and the messages in them."""
    ids, num_omitted = chat.encode_recent(messages, model.config.block_size)
    check_ids(ids, model, chat.tokenizer)
    return ids, messages[num_omitted:]


def check_ids(ids: Sequence[int], model: Any, tokenizer: Tokenizer) -> None:
    """Raise InputError for an id that the model has no row for, as a special token may have."""
    without_row = [id for id in ids if id >= model.config.vocab_size]
    if without_row:
        raise InputError(f"the model has no row for {tokenizer.label(without_row[0])}; leave it out")
