"""mlx-lm, on the CPU build of mlx."""

import mlx.core as mx
import mlx_lm
from engine import answer
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler


class MlxLm:
    def __init__(self, job):
        self.model, self.tokenizer = mlx_lm.load(job["folder"])

    def encode(self, text):
        return self.tokenizer.encode(text)

    def logprobs(self, ids):
        logits = self.model(mx.array([ids]))[0].astype(mx.float32)
        return (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist()

    def generate(self, ids, new):
        greedy = make_sampler(temp=0)
        responses = list(stream_generate(self.model, self.tokenizer, ids, max_tokens=new, sampler=greedy))
        tokens = [response.token for response in responses]
        return tokens[:-1] if responses[-1].finish_reason == "stop" else tokens


answer(MlxLm, "mlx-lm", "mlx", "transformers")
