# GPT-2 (124M) on OpenWebText, about half a million tokens per step. For eight large GPUs; not run yet:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

dataset = "openwebtext"
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# Rows per step over all processes: 12 * 40 = 480, which are 491,520 tokens.
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 600,000 such steps read about 295 billion tokens.
max_iters = 600_000
weight_decay = 0.1

eval_interval = 1000
eval_iters = 200
log_interval = 10
