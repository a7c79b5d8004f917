"""llama.cpp's server, which PyPI's xllamacpp ships."""

import json
import urllib.request

import xllamacpp
from engine import answer


class LlamaCpp:
    def __init__(self, job):
        params = xllamacpp.CommonParams()
        params.model.path = job["gguf"]
        params.n_ctx = 128
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = 1
        params.warmup = False
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.port = 0
        self.server = xllamacpp.Server(params)

    def ask(self, path, **request):
        data = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(self.server.listening_address + path, data, headers)
        ) as reply:
            return json.load(reply)

    def encode(self, text):
        return self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def logprobs(self, ids):
        rows = []
        for end in range(1, len(ids) + 1):
            reply = self.ask(
                "/completion", prompt=ids[:end], n_predict=1, n_probs=100, temperature=0, cache_prompt=False
            )
            rows.append(
                {entry["id"]: entry["logprob"] for entry in reply["completion_probabilities"][0]["top_logprobs"]}
            )
        return rows

    def generate(self, ids, new):
        return self.ask("/completion", prompt=ids, n_predict=new, temperature=0, return_tokens=True)["tokens"]


answer(LlamaCpp, "xllamacpp")
