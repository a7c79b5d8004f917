"""Small models with random weights, ours and transformers', every parameter away from its start."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from model import GPT, GPTConfig
from nanogpt import checkpoint
from nanogpt.text.tokenizer import Tokenizer

SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24}
MODERN = SMALL | {"arch": "modern", "bias": False}
CHARACTERS = Tokenizer.characters("To be, or not to be?\n\t😀  é")
GPT2_SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 100}
QWEN3_SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "vocab_size": 100,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


@torch.no_grad()
def randomize(model: Any, scale: float) -> Any:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


def build_gpt2(scale: float = 0.2, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**GPT2_SIZES | {"bos_token_id": 0, "eos_token_id": 0} | changes)
    return randomize(transformers.GPT2LMHeadModel(config), scale)


def build_qwen3(**changes: Any) -> Any:
    torch.manual_seed(0)
    return randomize(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3_SIZES | changes)), 0.1)


LLAMA_SIZES = {name: value for name, value in QWEN3_SIZES.items() if name != "head_dim"}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 64}


def build_llama(kind: str = "Llama", **changes: Any) -> Any:
    """A random model of transformers' class `kind`: "Llama", "Mistral" or "Qwen2"."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**LLAMA_SIZES | changes)
    return randomize(getattr(transformers, f"{kind}ForCausalLM")(config), 0.1)


def save_random_run(out_dir: str, tokenizer: Tokenizer | None = CHARACTERS, settings: Any = None, **sizes: Any) -> GPT:
    """Save a checkpoint as train.py does. settings: the run's, such as its dataset."""
    torch.manual_seed(0)
    vocab_size = tokenizer.vocab_size if tokenizer else 7
    model = randomize(GPT(GPTConfig(**{"vocab_size": vocab_size} | SMALL | sizes)), 0.3)
    for name, tensor in model.state_dict().items():
        if name in ("token_embedding.weight", "head.weight"):
            tensor[model.config.vocab_size :] = 0
    state: dict[str, Any] = {"step": 1234, "samples": 2000, "time_s": 1.0, "val_loss": 1.5, "best_val_loss": 1.5}
    state |= {"scaler": {}, "guard": {}, "processes": 1, "wandb_id": None, "model": asdict(model.config)}
    state["config"] = {"dataset": "/home/me/poems", "init_from": "scratch"} | (settings or {})
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    checkpoint.save(Path(out_dir), model.state_dict(), {}, state, tokenizer)
    return model


@torch.no_grad()
def generate_greedy(model: GPT, ids: list[int], count: int) -> list[int]:
    """Continue `ids` by `count` ids, without a cache."""
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids]))[0][0, -1].argmax())]
    return ids


def save_as_nanogpt(
    model: Any, path: Path, *, prefix: str = "_orig_mod.", bias: bool = True, zipped: bool = True, **more: Any
) -> Any:
    """Write a GPT-2 of transformers as nanoGPT's ckpt.pt, with `more` keys.

    prefix: that of compiled or distributed models. zipped: not torch's oldest format. Returns transformers' model of
    what these weights compute in nanoGPT, whose GELU is the exact one.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():  # nanoGPT's matrices are (out, in)
        if bias or not name.endswith(".bias"):
            tensors[prefix + name] = tensor.t().contiguous() if ".c_" in name and tensor.dim() == 2 else tensor
    c = model.config
    args = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "block_size": c.n_positions, "bias": bias}
    args |= {"vocab_size": c.vocab_size, "dropout": 0.0}
    content = {"model": tensors, "model_args": args, "iter_num": 7, "best_val_loss": torch.tensor(1.3)}
    torch.save(content | more, path, _use_new_zipfile_serialization=zipped)
    exact = transformers.GPT2LMHeadModel(transformers.GPT2Config(**c.to_dict() | {"activation_function": "gelu"}))
    exact.load_state_dict(
        {name: t if bias or not name.endswith(".bias") else 0 * t for name, t in model.state_dict().items()}
    )
    return exact.eval()
