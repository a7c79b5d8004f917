"""Compare ids of published tokenizers with those of tokenizers, transformers and tiktoken, on random hard texts.

    bash runs/tokenizers/download.sh FOLDER
    python runs/tokenizers/fuzz.py --tokenizers=FOLDER --prose=input.txt --texts=100000 --to=runs/tokenizers/fuzz.json

Of each text: the ids of data (special tokens' names are plain text) against tokenizers', the ids of a prompt against
transformers', and both against each other where the text names no special token. Qwen's ranks, Mistral's Tekken,
cl100k_base and o200k_base (with the ranks that Llama 3 and GPT-4o have from them) are compared with tiktoken. Two
tokenizers are trained on the prose, with the split patterns of --pattern.
"""

import argparse
import base64
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import tiktoken
import tokenizers
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from texts import fuzz_text  # noqa: E402

from nanogpt.text.fast_bpe import BYTE_DECODER, PATTERNS  # noqa: E402
from nanogpt.text.tokenizer import Tokenizer  # noqa: E402

# From the remote code of Qwen's first models, for which dashscope has the ranks.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OPENAI = {"cl100k_base": "llama3_1", "o200k_base": "gpt4o"}  # and the tokenizers that have the same ranks
OPENAI_RANKS = {"cl100k_base": 100256, "o200k_base": 199998}
Encoder = Callable[[list[str]], list[list[int]]]


def read_tiktoken(path: Path) -> tiktoken.Encoding:
    """tiktoken's own, or the encoding in a file of Qwen's (tokens and ranks in lines) or of Mistral's Tekken (JSON)."""
    if path.name in OPENAI:
        vocab = json.loads((path.parent / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        ranks = {
            bytes(BYTE_DECODER[character] for character in token): rank
            for token, rank in vocab.items()
            if rank < OPENAI_RANKS[path.name]
        }
        with mock.patch("tiktoken_ext.openai_public.load_tiktoken_bpe", return_value=ranks):
            return tiktoken.get_encoding(path.name)
    if path.suffix == ".tiktoken":
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        pattern, special = QWEN_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        pattern, special = content["config"]["pattern"], ["<s>", "</s>"]
        size = content["config"]["default_vocab_size"] - content["config"]["default_num_special_tokens"]
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in content["vocab"][:size]}
    names = {name: len(ranks) + i for i, name in enumerate(special)}
    return tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=names)


def find_tokenizers(folder: Path, prose: str) -> dict[str, Path]:
    """Tokenizers by name: the downloaded folders, the files for tiktoken, and two that are trained here on `prose`."""
    for pattern in PATTERNS:
        trained = folder / f"trained_{pattern}"
        trained.mkdir(exist_ok=True)
        Tokenizer.train_bpe([prose], 8192, pattern).save_pretrained(trained, 1024)
    paths = [path.parent for path in folder.glob("*/tokenizer.json")]
    paths += [path / name for name, other in OPENAI.items() for path in folder.glob(other)]
    paths += [*folder.glob("*.tiktoken"), *folder.glob("tekken*.json")]
    return {path.stem: path for path in sorted(paths)}


def load(path: Path) -> tuple[Tokenizer, Encoder, Encoder]:
    """Our tokenizer, their encoder of data, and their encoder of prompts."""
    if path.is_dir():
        plain = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        plain.encode_special_tokens = True
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        return (
            Tokenizer.from_name_or_path(str(path)),
            lambda texts: [encoding.ids for encoding in plain.encode_batch(texts, add_special_tokens=False)],
            lambda texts: theirs(texts, add_special_tokens=False)["input_ids"],
        )
    encoding = read_tiktoken(path)
    return (
        Tokenizer.from_tiktoken(encoding),
        encoding.encode_ordinary_batch,
        lambda texts: encoding.encode_batch(texts, allowed_special="all"),
    )


def batches(count: int, prose: str, names: list[str]) -> Iterator[list[str]]:
    rng = random.Random(count)
    for start in range(0, count, 2000):
        yield [fuzz_text(rng, prose, names) for _ in range(min(2000, count - start))]


def compare(path: Path, count: int, prose: str) -> dict[str, Any]:
    """Numbers of texts, and of those with different ids."""
    ours, encode_data, encode_prompts = load(path)
    names = [token.content for token in ours._inner.get_added_tokens_decoder().values()]
    result = dict.fromkeys(("texts", "by_gigatoken", "data", "prompts", "data_and_prompts"), 0)
    examples = []
    for texts in batches(count, prose, names):
        for text, data, prompt in zip(texts, encode_data(texts), encode_prompts(texts), strict=True):
            our_data, our_prompt = ours.encode_ordinary(text).tolist(), ours.encode(text)
            is_plain = not any(name in text for name in ours.special_tokens)
            result["texts"] += 1
            result["by_gigatoken"] += ours._gigatoken is not None and ours._gigatoken(text) is not None
            differs = {
                "data": our_data != data,
                "prompts": our_prompt != prompt,
                "data_and_prompts": is_plain and our_data != our_prompt,
            }
            for name, is_different in differs.items():
                result[name] += is_different
            if any(differs.values()):
                examples.append(text)
    return result | {"end_of_text": ours._inner.id_to_token(ours.end_of_text), "examples": examples[:3]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--prose", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--only", default="")
    parser.add_argument("--to", type=Path, default=ROOT / "runs/tokenizers/fuzz.json")
    args = parser.parse_args()

    prose = args.prose.read_text(encoding="utf-8")
    packages = ("tokenizers", "transformers", "tiktoken", "gigatoken")
    report: dict[str, Any] = {"versions": {name: version(name) for name in packages}}
    for name, path in find_tokenizers(args.tokenizers, prose).items():
        if args.only in name:
            start = time.perf_counter()
            report[name] = compare(path, args.texts, prose)
            print(f"{name}: {report[name]}, {time.perf_counter() - start:.0f} s", flush=True)
            args.to.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
