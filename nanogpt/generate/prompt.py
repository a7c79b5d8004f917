"""Encode a prompt, or a conversation, that a model continues."""

from typing import Any

from nanogpt.errors import InputError
from nanogpt.text.chat import Chat, Messages
from nanogpt.text.tokenizer import Tokenizer


def encode_prompt(prompt: str, model: Any, tokenizer: Tokenizer) -> list[int]:
    """Encode a text. Raises InputError for an empty one, or one that does not fit the model."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("the prompt is empty")
    return check_ids(ids, model)


def encode_conversation(messages: Messages, model: Any, chat: Chat) -> tuple[list[int], Messages]:
    """Encode a conversation up to where the next answer begins. Returns the ids, and the messages in them."""
    ids, num_omitted = chat.encode_recent(messages, model.config.block_size)
    return check_ids(ids, model), messages[num_omitted:]


def check_ids(ids: list[int], model: Any) -> list[int]:
    """Return `ids`. Raises InputError if they do not fit the model's vocabulary or context."""
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    if max(ids) >= vocab_size:
        raise InputError("the text has a special token that the model has no row for; leave it out")
    if len(ids) > block_size:
        raise InputError(f"the prompt has {len(ids):,} tokens, more than the context of {block_size:,}; shorten it")
    return ids
