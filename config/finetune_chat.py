# A pretrained model learns to answer, from conversations of your own: JSON lines with messages, or prompt and completion.
#   python data/prepare.py --input talks.jsonl --chat=True --tokenizer=gpt2 --out=data/chat
#   python train.py config/finetune_chat.py
#   python sample.py --out_dir=out-chat --chat=True --interactive=True
# Another model wants its own tokens, whose chat template comes along: --tokenizer=Qwen/Qwen3-0.6B above, and here
# --init_from=Qwen/Qwen3-0.6B. Tested on small models alone; the rates are the usual ones, not tuned by us.

init_from = "gpt2"
dataset = "chat"
out_dir = "out-chat"

# 32 rows of 1,024 tokens a step, of which the answers alone count. How many steps make a pass over the data is said at
# the start; two or three passes are enough.
block_size = 1024
batch_size = 4
gradient_accumulation_steps = 8
row_order = "epoch"
max_iters = 200
learning_rate = 2e-5
warmup_iters = 10
weight_decay = 0.0

eval_interval = 20
eval_iters = 0
always_save_checkpoint = False  # the best is wanted, not the last
