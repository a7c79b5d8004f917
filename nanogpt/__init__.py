"""The toolbox behind the scripts in the root: data, tokenizers, optimizer, checkpoints, decoding."""

__version__ = "0.2.0"
