"""OpenVINO: the network by optimum-intel, the tokenizer by openvino-tokenizers."""

import openvino
import openvino_tokenizers
import torch
from engine import answer
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer


class OpenVino:
    def __init__(self, job):
        options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self.model = OVModelForCausalLM.from_pretrained(
            job["folder"], export=True, load_in_8bit=False, ov_config=options
        )
        tokenizer = AutoTokenizer.from_pretrained(job["folder"])
        try:
            self.tokenizer = openvino.compile_model(openvino_tokenizers.convert_tokenizer(tokenizer), "CPU")
        except Exception as error:  # the network runs without it
            self.tokenizer = error

    def encode(self, text):
        if isinstance(self.tokenizer, Exception):
            raise self.tokenizer
        return self.tokenizer([text])["input_ids"][0]

    def logprobs(self, ids):
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def generate(self, ids, new):
        output = self.model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0, len(ids) :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return output[:-1] if output[-1] in ends else output


answer(OpenVino, "openvino", "optimum-intel", "openvino-tokenizers", "transformers")
