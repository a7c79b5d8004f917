"""CTranslate2, by its converter from transformers. It takes tokens, not text: their names are transformers'."""

import ctranslate2
import numpy as np
from ctranslate2.converters import TransformersConverter
from engine import answer
from transformers import AutoTokenizer


class CTranslate2:
    def __init__(self, job):
        self.tokenizer = AutoTokenizer.from_pretrained(job["folder"])
        TransformersConverter(job["folder"]).convert(job["work"], force=True)
        self.generator = ctranslate2.Generator(job["work"], device="cpu", compute_type="float32")

    def encode(self, text):
        return self.tokenizer(text)["input_ids"]

    def logprobs(self, ids):
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        return np.array(self.generator.forward_batch([tokens], return_log_probs=True))[0]

    def generate(self, ids, new):
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        options = {"max_length": new, "sampling_topk": 1, "include_prompt_in_result": False}
        return self.generator.generate_batch([tokens], **options)[0].sequences_ids[0]


answer(CTranslate2, "ctranslate2", "transformers")
