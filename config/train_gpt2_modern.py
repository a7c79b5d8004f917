# A model of GPT-2's size (124M) with the modern recipe, on OpenWebText. For eight large GPUs; not run yet:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_modern.py

out_dir = "out-gpt2-modern"
dataset = "openwebtext"

arch = "modern"
n_layer = 12
n_head = 6
head_dim = 128
n_embd = 768

# 480 rows of 1,024 tokens per step, as in train_gpt2.py.
batch_size = 30
block_size = 1024
gradient_accumulation_steps = 16

# For square matrices this muon_lr equals 0.02 in the unscaled form of Jordan et al.
optimizer = "muon"
learning_rate = 3e-3
muon_lr = 3.6e-3
schedule = "trapezoid"
warmup_iters = 100
min_lr = 0.0
max_iters = 20_000  # ten billion tokens

eval_interval = 500
eval_iters = 200
