"""llama.cpp's server, which PyPI's xllamacpp ships."""

import json
import urllib.request

import xllamacpp
from engine import answer


class LlamaCpp:
    def __init__(self, job):
        if not job["gguf"].endswith(".gguf"):
            raise RuntimeError(job["gguf"])  # the reason why there is none
        params = xllamacpp.CommonParams()
        params.model.path = job["gguf"]
        params.n_ctx = 128
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = 1
        params.warmup = False
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
        params.port = 0
        self.server = xllamacpp.Server(params)

    def ask(self, path, **request):
        data = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data, headers)
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def encode(self, text):
        return self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def logprobs(self, ids):
        # Force the first token of " a", a whole character: the server gives no probabilities with a part of one. Those
        # that it gives are from before the bias.
        bias = [[token, 1e3] for token in self.encode(" a")[:1]]
        options = {"n_predict": 1, "n_probs": 50, "temperature": 0, "cache_prompt": False, "logit_bias": bias}
        replies = [self.ask("/completion", prompt=ids[: end + 1], **options) for end in range(len(ids))]
        tops = [reply["completion_probabilities"][0]["top_logprobs"] for reply in replies]
        return [{entry["id"]: entry["logprob"] for entry in top} for top in tops]

    def generate(self, ids, new):
        reply = self.ask("/completion", prompt=ids, n_predict=new, temperature=0, return_tokens=True)
        return reply["tokens"][:-1] if reply["stop_type"] == "eos" else reply["tokens"]


answer(LlamaCpp, "xllamacpp")
