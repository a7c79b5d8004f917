"""llama.cpp, as xllamacpp brings it, behind a pipe: python runs/gguf/llama_server.py MODEL.gguf

Prints a line when the model is loaded. Then each line of input is a request as JSON, {"path": "/tokenize", "body": …},
and each line of output its answer. The key-value cache is float32 and attention is plain, so that nothing is rounded
but what the file rounds.
"""

import json
import sys
import urllib.error
import urllib.request

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 512
params.n_parallel = 1
params.cpuparams.n_threads = 1
params.warmup = False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print(json.dumps({"xllamacpp": xllamacpp.__version__}), flush=True)

for line in sys.stdin:
    question = json.loads(line)
    request = urllib.request.Request(
        server.listening_address + question["path"],
        data=json.dumps(question["body"]).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        answer = {"error": error.read().decode()}
    print(json.dumps(answer), flush=True)
