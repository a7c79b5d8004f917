"""Read nanoGPT's ckpt.pt."""

import os
import zipfile
from pathlib import Path
from typing import Annotated, Any

import torch

from nanogpt.errors import InputError, first_line
from nanogpt.files import regular_file_size, utf8_path
from nanogpt.interop.names import Weights, strip_wrappers, translate, validate_sizes
from nanogpt.interop.safe_pickle import refuse_code
from nanogpt.schema import Limits, matches
from nanogpt.text.tokenizer import GPT2_VOCAB

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
NANOGPT_PADDED_VOCAB = 50304
HINT = "give a ckpt.pt that nanoGPT's train.py wrote"


def read_nanogpt(path: str | Path) -> Weights:
    """Read the model in nanoGPT's `ckpt.pt`, or in the folder that holds it. Its GELU is the exact one ("erf").

    Raises InputError if the file is missing or damaged, would run code, or is not a checkpoint of nanoGPT.
    """
    path = Path(path) / "ckpt.pt" if os.path.isdir(path) else Path(path)
    content = _read_pickle(path)
    model: Any = content.get("model")
    model_args: Any = content.get("model_args")
    train_config: Any = content.get("config")
    has_tensors = isinstance(model, dict) and all(isinstance(n, str) and torch.is_tensor(t) for n, t in model.items())
    if not has_tensors or not isinstance(model_args, dict):
        raise InputError(f"{path}: no weights under 'model', or no 'model_args'; {HINT}")
    # A view of a single number can have any shape; tied weights are stored once.
    if sum(tensor.nbytes for tensor in model.values()) > 2 * path.stat().st_size:
        raise InputError(f"{path}: states tensors larger than the file; {HINT}")

    config = {name: model_args.get(name) for name in SIZES}
    validate_sizes(str(path), config)
    config |= {"dropout": model_args.get("dropout", 0.0), "bias": model_args.get("bias", True), "gelu": "erf"}
    if not matches(config["dropout"], Annotated[float, Limits(ge=0, lt=1)]) or not matches(config["bias"], bool):
        raise InputError(f"{path}: dropout or bias in 'model_args' is not a number from 0 to 1 or a boolean; {HINT}")

    has_dataset = isinstance(train_config, dict) and isinstance(train_config.get("dataset"), str)
    weights = Weights(
        source=str(path),
        config=config,
        tensors=translate(str(path), strip_wrappers(str(path), model), config, transposed=False),
        notes=[f"{path}: nanoGPT's optimizer state is not used; the optimizer starts anew"],
        train_config=train_config if has_dataset else {},
    )
    if config["vocab_size"] == NANOGPT_PADDED_VOCAB:
        weights.cut_vocabulary(GPT2_VOCAB)
        padding = NANOGPT_PADDED_VOCAB - GPT2_VOCAB
        weights.notes.append(f"{path}: dropped {padding} padding rows; GPT-2's vocabulary has {GPT2_VOCAB}")
    weights.gpt2_encoding = config["vocab_size"] == GPT2_VOCAB
    return weights


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        refuse_code(path, regular_file_size(path))
        # Memory-mapped (which the oldest format cannot be), so that the optimizer state inside takes no memory.
        with utf8_path(path) as name:
            content = torch.load(name, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a broken pickle raises anything
        raise InputError(f"{path}: cannot be read ({first_line(error)}); {HINT}") from error
    return content if isinstance(content, dict) else {}
