"""export.py against transformers: the same function, the same text, quietly; and back again to the same bytes."""

import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from test_tokenizer import CACHE, HARD, noise

import export
from model import GPT, GPTConfig
from nanogpt import checkpoint
from nanogpt.errors import InputError, run_script
from nanogpt.text.tokenizer import END_OF_TEXT, Tokenizer

TEXT = "To be, or not to be?\n\t😀  é"
CHARACTERS = Tokenizer.characters(TEXT)
SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24}
MODERN = SMALL | {"arch": "modern", "bias": False}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": SMALL | {"dropout": 0.1},
    "gpt2, erf, no bias": SMALL | {"gelu": "erf", "bias": False, "n_inner": 72, "norm_eps": 1e-3},
    "modern, untied": MODERN | {"tied": False, "n_kv_head": 2, "head_dim": 12, "rope_theta": 5e5, "norm_eps": 1e-3},
    "modern, tied": MODERN | {"n_kv_head": 1, "n_inner": 40},
}
Export = Callable[..., Path]


def train_nothing(out_dir: Path, tokenizer: Tokenizer | None = CHARACTERS, **shape: Any) -> GPT:
    """A run's checkpoint with weights far from their start, so that none goes missing unnoticed."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"vocab_size": tokenizer.vocab_size if tokenizer else 7} | SMALL | shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for name in ("tokens.weight", "head.weight"):
            if name in model.state_dict():
                model.state_dict()[name][model.config.vocab_size :] = 0
    state: dict[str, Any] = {"step": 1234, "samples": 2000, "time_s": 1.0, "val_loss": 1.5, "best_val_loss": 1.5}
    state |= {"scaler": {}, "guard": {}, "processes": 1, "wandb_id": None, "model": asdict(model.config)}
    state |= {"config": {"dataset": "/home/me/poems", "init_from": "scratch"}}
    checkpoint.save(out_dir, model.state_dict(), {}, state, tokenizer)
    return model


@pytest.fixture
def run_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """`run_export("to", "--flag" …)`: the folder that export.py has written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(to: str, *flags: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["export.py", f"--to={to}", *flags])
        export.main()
        return Path(to)

    return call


class Heard(logging.Handler):
    """Whatever transformers warns of; its loggers do not hand on to the root's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fails the test that makes transformers warn, by log or by warning."""
    heard, log = Heard(), logging.getLogger("transformers")
    log.addHandler(heard)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    log.removeHandler(heard)
    assert heard.lines == []


def greedy(model: GPT, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids]))[0][0, -1].argmax())]
    return ids


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("model*"))
    both = [(one / name).read_bytes() == (other / name).read_bytes() for name in names]
    return names == sorted(path.name for path in other.glob("model*")) and len(names) > 0 and all(both)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_transformers_computes_the_same_and_back(run_export: Export, quiet: None, shape: dict[str, Any]):
    ours = train_nothing(Path("out"), **shape)
    folder = run_export("theirs", "--out_dir=out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if ours.config.arch == "modern" else "GPT2LMHeadModel")
    assert getattr(theirs.config, "resid_pdrop", 0.0) == ours.config.dropout
    assert len(theirs.get_output_embeddings().weight) == CHARACTERS.vocab_size  # the true rows
    idx = torch.randint(CHARACTERS.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    logits = ours(idx, idx)[0]
    assert logits is not None
    assert (theirs(idx).logits - logits).abs().max() <= 1e-5
    words = transformers.AutoTokenizer.from_pretrained(folder)
    new = theirs.generate(**words("To be", return_tensors="pt"), max_new_tokens=19, do_sample=False)
    expected = greedy(ours, CHARACTERS.encode("To be"), 19)
    assert len(set(expected)) > 3
    assert words.decode(new[0]) == CHARACTERS.decode(expected)

    back = GPT.from_pretrained(str(folder), dropout=ours.config.dropout)
    assert asdict(back.config) == asdict(ours.config) | {"bias": ours.config.arch == "gpt2"}
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())
    for dtype in ("float32", "bfloat16"):
        first = run_export(f"first-{dtype}", "--out_dir=out", f"--dtype={dtype}")
        again = run_export(f"again-{dtype}", f"--init_from={first}", f"--dtype={dtype}")
        assert same_bytes(first, again)
    assert transformers.AutoModelForCausalLM.from_pretrained(again).dtype == torch.bfloat16
    assert next(iter(load_file(again / "model.safetensors").values())).dtype == torch.bfloat16


def bpe(*, with_end: bool) -> Tokenizer:
    """Byte pairs; with an end of text also what would put it around each text."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    if with_end:
        inner.add_special_tokens([END_OF_TEXT])
        end = (END_OF_TEXT, inner.token_to_id(END_OF_TEXT))
        single = f"{END_OF_TEXT} $A {END_OF_TEXT}"
        inner.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=[end])
    return Tokenizer(inner)


@pytest.mark.parametrize("kind", ["char", "bpe", "bpe with an end", "gpt2"])
def test_tokenizers(tmp_path: Path, run_export: Export, quiet: None, kind: str, monkeypatch: pytest.MonkeyPatch):
    texts = [*HARD, noise(3), "Wait -- what ?  He 's gone , isn 't he ."]
    if kind == "gpt2":
        if not CACHE.exists():
            pytest.skip(f"{CACHE} is absent: GPT-2's encoding needs the network")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.environ.get("TIKTOKEN_CACHE_DIR", str(CACHE)))
        ours = Tokenizer.gpt2()
    else:
        ours = Tokenizer.characters("".join(texts)) if kind == "char" else bpe(with_end=kind != "bpe")
    train_nothing(Path("out"), ours, n_embd=8, n_layer=1)
    folder = run_export("theirs", "--out_dir=out")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = theirs(text, verbose=False)["input_ids"]  # else it speaks of texts that are longer than the context
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert (len(theirs), theirs.model_max_length) == (ours.vocab_size, 24)
    end, generation = ours.end_of_text, json.loads((folder / "generation_config.json").read_text())
    assert (theirs.eos_token_id, theirs.bos_token_id, generation.get("eos_token_id")) == (end, end, end)
    assert (end is None) == (kind in ("char", "bpe"))
    if kind == "char":
        with pytest.raises(Exception, match=r"Missing .* from the vocabulary"):
            theirs("\ue000")  # no other character stands in for one that the model lacks
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == end
    model.generate(**theirs("a", return_tensors="pt"), max_new_tokens=2)


def test_shards(run_export: Export, quiet: None):
    ours = train_nothing(Path("out"), **SHAPES["modern, untied"])
    folder = run_export("theirs", "--out_dir=out", "--shard_gb=2e-5")
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in sorted(folder.glob("model-*"))]
    assert len(sizes) > 2
    assert max(sizes) <= 20_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    idx = torch.arange(CHARACTERS.vocab_size)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert (theirs(idx).logits - ours(idx, idx)[0]).abs().max() <= 1e-5
    assert same_bytes(folder, run_export("again", f"--init_from={folder}", "--shard_gb=2e-5"))


def test_model_card(run_export: Export, capsys: pytest.CaptureFixture[str]):
    model = train_nothing(Path("out"))
    Path("new").mkdir()  # an empty folder may be there
    card = (run_export("new", "--out_dir=out") / "README.md").read_text()
    padding = (64 - CHARACTERS.vocab_size) * 32
    known = {"steps": "1,234", "tokens": "48,000", "validation loss": "1.5000 nats per token", "dataset": "poems"}
    known |= {"parameters": f"{sum(p.numel() for p in model.parameters()) - padding:,}", "weights": "float32"}
    assert all(f"| {what} | {value} |" in card for what, value in known.items())
    assert "/home/me" not in card
    assert "wrote new: " in capsys.readouterr().out
    card = (run_export("deep/er", "--init_from=new", "--dtype=bfloat16") / "README.md").read_text()
    assert "| taken from | new |" in card
    assert "| steps |" not in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to="], "to is empty: say where to write, with --to=FOLDER"),
        (["--to=full"], "to=full is there already and is not overwritten: delete it, or give another --to"),
        (["--to=full/file"], r"to=full/file is there already"),
        (["--to=full/file/x"], r"to=full/file/x could not be written \(Not a directory\)"),
        (["--to=" + 300 * "x"], r"could not be written \(File name too long\)"),
        (["--to=/proc/x/y"], r"to=/proc/x/y could not be written"),
        (["--to=taken"], r"taken\.partial is there: wait for the export that writes it, or delete"),
        (["--out_dir=nothing"], r"nothing holds no checkpoint .*train one with --out_dir=nothing first"),
        (["--out_dir=half"], r"half holds no checkpoint"),
        (["--out_dir=broken"], r"step-001234 is damaged: the SHA-256 of model\.safetensors"),
        (["--checkpoint=step-000007"], r"no such checkpoint in out; it has step-001234"),
        (["--out_dir=mute"], r"mute has no tokenizer, and 7 ids are not GPT-2's: put the tokenizer\.json"),
        (["--out_dir=other"], r"other: the tokenizer has \d+ ids, the model 7: it belongs to another model"),
        (["--shard_gb=0", "--dtype=int8"], r"shard_gb=0: must be above 0\n--dtype=int8: expected float32 or bfloat16"),
    ],
)
def test_what_cannot_be_exported(run_export: Export, flags: list[str], message: str):
    train_nothing(Path("out"))
    train_nothing(Path("mute"), None)
    train_nothing(Path("other"), CHARACTERS, vocab_size=7)
    train_nothing(Path("broken"))
    with (Path("broken") / "ckpt/step-001234/model.safetensors").open("rb+") as file:
        file.write(b"\0")
    train_nothing(Path("half"))
    Path("half/ckpt/step-001234").rename("half/ckpt/.step-001234.partial")  # as one that is being written
    Path("full").mkdir()
    Path("full/file").touch()
    Path("taken.partial").mkdir()
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError, match=message):
        run_export("new/folder", "--out_dir=out", *flags)
    assert sorted(Path().rglob("*")) == before


def test_a_full_disk_leaves_nothing(run_export: Export, monkeypatch: pytest.MonkeyPatch):
    train_nothing(Path("out"))
    before = sorted(Path().rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
        with pytest.raises(InputError, match=r"could not be written \(.* kB are needed, 9 B are free\): make room"):
            run_export("new/folder", "--out_dir=out")
        assert sorted(Path().rglob("*")) == before

    def breaks(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", breaks)
    with pytest.raises(KeyboardInterrupt):
        run_export("new/folder", "--out_dir=out")
    assert sorted(Path().rglob("*")) == before


def test_faults_end_with_status_2_and_a_line(run_export: Export, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run_export("new", "--out_dir=nothing") and None)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: nothing holds no checkpoint")
