"""transformers, whose classes the export names."""

import torch
from engine import answer
from transformers import AutoModelForCausalLM, AutoTokenizer


class Transformers:
    def __init__(self, job):
        self.tokenizer = AutoTokenizer.from_pretrained(job["folder"])
        self.model = AutoModelForCausalLM.from_pretrained(job["folder"])

    def encode(self, text):
        return self.tokenizer(text)["input_ids"]

    @torch.no_grad()
    def logprobs(self, ids):
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def generate(self, ids, new):
        output = self.model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0, len(ids) :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return output[:-1] if output[-1] in ends else output


answer(Transformers, "transformers", "tokenizers", "torch")
