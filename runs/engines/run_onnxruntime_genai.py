"""ONNX Runtime GenAI, by its model builder."""

import runpy
from unittest import mock

import numpy as np
import onnxruntime_genai as og
from engine import answer


class OnnxRuntimeGenAI:
    def __init__(self, job):
        flags = ["-i", job["folder"], "-o", job["work"], "-c", job["work"] + "/cache", "-p", "fp32", "-e", "cpu"]
        with mock.patch("sys.argv", ["builder", *flags]):
            runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
        self.model = og.Model(job["work"])
        self.tokenizer = og.Tokenizer(self.model)

    def start(self, ids, length):
        params = og.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, max_length=length)
        generator = og.Generator(self.model, params)
        generator.append_tokens(np.array(ids, np.int32))
        return generator

    def encode(self, text):
        return self.tokenizer.encode(text)

    def logprobs(self, ids):
        generator = self.start(ids, len(ids) + 1)
        logits = np.array(generator.get_output("logits"), np.float64)[0]
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    def generate(self, ids, new):
        generator = self.start(ids, len(ids) + new)
        while not generator.is_done():
            generator.generate_next_token()
        return generator.get_sequence(0)[len(ids) :]


answer(OnnxRuntimeGenAI, "onnxruntime-genai", "onnxruntime", "transformers")
