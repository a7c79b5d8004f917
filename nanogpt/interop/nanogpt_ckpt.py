"""Read nanoGPT's ckpt.pt."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from nanogpt.errors import InputError
from nanogpt.files import matches_schema, regular_file_size
from nanogpt.interop.names import Weights, brief, checked_sizes, strip_wrappers, translate
from nanogpt.interop.safe_pickle import refuse_code
from nanogpt.text.tokenizer import GPT2_VOCAB

NANOGPT_PADDED_VOCAB = 50304


def read_nanogpt(path: str | Path) -> Weights:
    """A checkpoint of nanoGPT: `ckpt.pt` or the folder that holds it. Its GELU is the exact one ("erf").

    Raises InputError where the file is missing, damaged, asks to run code, or is no checkpoint of nanoGPT.
    """
    path = Path(path) / "ckpt.pt" if os.path.isdir(path) else Path(path)
    remedy = "give a ckpt.pt that nanoGPT's train.py wrote"
    try:
        size = regular_file_size(path)
        refuse_code(path, size)
        # Memory-mapped (which the oldest format cannot be), so that the optimizer's state inside costs nothing.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # broken pickles raise whatever their bytes happen to mean
        raise InputError(f"{path} was not read ({brief(error)}): {remedy}") from error
    content: Any = checkpoint if isinstance(checkpoint, dict) else {}
    model, args, settings = content.get("model"), content.get("model_args"), content.get("config")
    named = isinstance(model, dict) and all(isinstance(n, str) and torch.is_tensor(t) for n, t in model.items())
    if not named or not isinstance(args, dict):
        raise InputError(f"{path} has no weights under 'model', or no 'model_args': {remedy}")
    # A view of a single number can be of any shape; but tied weights are stored once.
    if sum(tensor.nbytes for tensor in model.values()) > 2 * size:
        raise InputError(f"{path} states tensors larger than itself: {remedy}")

    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    config = checked_sizes(str(path), {name: args.get(name) for name in sizes})
    config |= {"dropout": args.get("dropout", 0.0), "bias": args.get("bias", True), "gelu": "erf"}
    if not matches_schema(config, {"dropout": float, "bias": bool}):
        raise InputError(f"{path}: dropout or bias in 'model_args' is neither number nor switch: {remedy}")
    tensors = translate(str(path), strip_wrappers(str(path), model), config, transposed=False)
    weights = Weights(
        source=str(path),
        config=config,
        tensors=tensors,
        notes=[f"{path}: nanoGPT's optimizer state is not taken over; the optimizer starts afresh"],
        train_config=settings if matches_schema(settings, {"dataset": str}) else {},
    )
    if config["vocab_size"] == NANOGPT_PADDED_VOCAB:
        config["vocab_size"] = GPT2_VOCAB
        tensors["tokens.weight"] = tensors["tokens.weight"][:GPT2_VOCAB].clone()
        weights.notes.append(
            f"{path}: {NANOGPT_PADDED_VOCAB} rows are GPT-2's {GPT2_VOCAB} and padding, which is dropped"
        )
    weights.gpt2_encoding = config["vocab_size"] == GPT2_VOCAB
    return weights
