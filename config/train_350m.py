# 350M parameters with the modern recipe, on OpenWebText. For eight large GPUs; not run yet:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_350m.py

out_dir = "out-350m"
dataset = "openwebtext"

arch = "modern"
n_layer = 24
n_head = 8
head_dim = 128
n_embd = 1024

# 512 rows of 1,024 tokens per step.
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 32

optimizer = "muon"
learning_rate = 2e-3
muon_lr = 3e-3
schedule = "trapezoid"
warmup_iters = 200
min_lr = 0.0
max_iters = 15_000  # eight billion tokens, about 22 per parameter

eval_interval = 500
eval_iters = 200
