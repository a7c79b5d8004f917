"""LoRA against PEFT: logits, loss and the gradient of every adapter, and folders in both directions."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from random_models import build_gpt2, build_llama, build_qwen3
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from model import GPT
from nanogpt.errors import InputError
from nanogpt.interop.huggingface import read_weights
from nanogpt.interop.peft import CONFIG, TENSORS, tensor_names, write_peft
from nanogpt.lora import add_lora

TOLERANCE = 1e-5  # float32 in another order of operations
IDX = torch.arange(32).view(2, 16) * 7 % 100
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BUILD: dict[str, Any] = {
    "GPT-2": (build_gpt2, "attention,mlp"),
    "GPT-2, one of two c_proj": (build_gpt2, "c_attn, out"),
    "Qwen3": (build_qwen3, "v_proj,mlp"),
    "Llama": (build_llama, "attention,mlp"),
    "Mistral": (lambda: build_llama("Mistral", sliding_window=None), "q_proj,k_proj,down"),
    "Qwen2": (lambda: build_llama("Qwen2"), "qkv"),
}
NUM_ADAPTERS = dict(zip(BUILD, (8, 4, 8, 14, 6, 6), strict=True))  # in two layers


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft")  # here, for its import takes three seconds


def build(kind: str, folder: Path) -> tuple[Any, GPT, dict[str, torch.Tensor]]:
    """transformers' model, ours with random adapters, and these; `folder` has the base and the adapters for PEFT."""
    make, targets = BUILD[kind]
    oracle = make()
    oracle.save_pretrained(folder / "base")
    oracle.set_attn_implementation("eager")
    model = GPT.from_pretrained(folder / "base")
    before = model(IDX, IDX)[0]
    add_lora(model, str(folder / "base"), rank=4, alpha=10.0, targets=targets)
    assert torch.equal(model(IDX, IDX)[0], before)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in adapters.values():
        p.data.normal_(std=0.1)
    assert (model(IDX, IDX)[0] - before).abs().max() > 0.1
    (folder / "adapters").mkdir()
    write_peft(folder / "adapters", adapters, model.lora, asdict(model.config))
    return oracle, model, adapters


@pytest.mark.parametrize("kind", BUILD)
def test_lora_equals_peft(kind: str, tmp_path: Path, peft: Any):
    oracle, model, adapters = build(kind, tmp_path)
    assert len(adapters) == 2 * NUM_ADAPTERS[kind]
    theirs = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapters", is_trainable=True)
    if model.config.arch == "gpt2":  # transformers computes the norms of the others in float32 anyway
        theirs.double()
        model.double()
    expected = theirs(input_ids=IDX, labels=IDX)
    expected.loss.backward()
    logits, loss = model(IDX, F.pad(IDX[:, 1:], (0, 1), value=-1))
    loss.backward()
    assert (logits - expected.logits).abs().max() <= TOLERANCE * expected.logits.abs().max()
    assert abs(loss - expected.loss) <= TOLERANCE * expected.loss

    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    names = tensor_names(asdict(model.config))
    for name, p in adapters.items():
        gradient = gradients.pop(names[name].replace(".weight", ".default.weight"))
        assert (p.grad - gradient).abs().max() <= TOLERANCE * gradient.abs().max(), name
    assert not gradients
    assert all(p.grad is None for name, p in model.named_parameters() if name not in adapters)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
@torch.no_grad()
def test_folders_of_peft_are_read_merged(kind: str, changes: dict[str, Any], tmp_path: Path, peft: Any):
    """Ours, as PEFT writes it again."""
    oracle, model, _ = build(kind, tmp_path)
    theirs = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapters", **changes)
    if changes:
        path = tmp_path / "adapters" / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        theirs = peft.PeftModel.from_pretrained(BUILD[kind][0](), tmp_path / "adapters")
    expected = theirs(IDX).logits
    assert changes or (model(IDX, IDX)[0] - expected).abs().max() <= TOLERANCE * expected.abs().max()
    theirs.save_pretrained(tmp_path / "again")
    for folder in ("adapters", "again"):
        merged = GPT.from_pretrained(tmp_path / folder)
        assert (merged(IDX, IDX)[0] - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_adapters_that_compute_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build("Llama", tmp_path)
    folder = tmp_path / "adapters"
    settings = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / TENSORS)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

    def refuse(reason: str, changes: dict[str, Any], stored: dict[str, torch.Tensor]) -> None:
        (folder / CONFIG).write_text(json.dumps(settings | changes))
        save_file(stored, folder / TENSORS)
        with pytest.raises(InputError, match=reason) as caught:
            read_weights(folder)
        assert "\n" not in str(caught.value)

    refuse("use_dora=True is not supported", {"use_dora": True}, tensors)
    refuse("init_lora_weights='pissa' is not supported", {"init_lora_weights": "pissa"}, tensors)
    refuse("does not name the model", {"base_model_name_or_path": None}, tensors)
    refuse("does not name the model", {"base_model_name_or_path": str(folder)}, tensors)
    other = tmp_path / "other"
    other.mkdir()
    (other / CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": str(folder)}))
    refuse("has adapters itself", {"base_model_name_or_path": str(other)}, tensors)
    refuse("other layers than the blocks'", {}, tensors | {name.replace("q_proj", "x_proj"): tensors[name].clone()})
    refuse("do not fit its base", {}, tensors | {name: tensors[name][:, :-1].clone()})
    refuse("do not fit its base", {}, {other: tensor for other, tensor in tensors.items() if other != name})
    for changes in ({"lora_alpha": None}, {"lora_alpha": int("9" * 400)}, {"r": 0}, {"r": "4"}):
        refuse("has r=.* and lora_alpha=.*; restore it", changes, tensors)
    refuse("not matrices of rank r=8", {"r": 8}, tensors)
    refuse("not matrices of rank", {}, tensors | {name: tensors[name] + 1j})
    refuse("does not name the model", {"base_model_name_or_path": "a\0b"}, tensors)
    refuse("was not downloaded", {"base_model_name_or_path": "a" * 5000}, tensors)
    (other / CONFIG).rename(other / "ckpt")
    refuse("is a run; export that", {"base_model_name_or_path": str(other)}, tensors)
    wide = {other: t[:1].clone() if "lora_B" in other else t for other, t in tensors.items()}  # would broadcast
    refuse("do not fit its base", {}, wide)
    monkeypatch.chdir(tmp_path)
    other.rename("gpt2")  # a name that never means a folder
    monkeypatch.setattr("nanogpt.interop.huggingface.read_weights", Mock(side_effect=InputError("read as the hub's")))
    refuse("read as the hub's", {"base_model_name_or_path": "gpt2"}, tensors)


def test_adapters_of_another_base_are_refused(tmp_path: Path):
    """The hash of their base is in the file. The run may have had a shorter context."""
    build("GPT-2", tmp_path)
    model = GPT.from_pretrained(tmp_path / "base", block_size=8)
    add_lora(model, str(tmp_path / "base"), rank=4, alpha=10.0, targets="attention")
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    write_peft(tmp_path / "adapters", adapters, model.lora, asdict(model.config))
    assert read_weights(tmp_path / "adapters").config["block_size"] == 16
    weights = tmp_path / "base/model.safetensors"
    changed = load_file(weights)
    changed["transformer.h.1.mlp.c_fc.weight"][0, 0] += 1e-3
    save_file(changed, weights, {"format": "pt"})
    with pytest.raises(InputError, match="its adapters were trained on another base"):
        read_weights(tmp_path / "adapters")
