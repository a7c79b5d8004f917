# The size of GPT-2 (124M) by the modern recipe, on OpenWebText; meant for eight large GPUs, on which it has not been run:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_modern.py

out_dir = "out-gpt2-modern"
dataset = "openwebtext"

arch = "modern"
n_layer = 12
n_head = 6
head_dim = 128
n_embd = 768

# 480 rows of 1,024 tokens a step, as in train_gpt2.py.
batch_size = 30
block_size = 1024
gradient_accumulation_steps = 16

# Muon's rate gives square matrices the updates that 0.02 gives in the unscaled form of Jordan et al.
optimizer = "muon"
learning_rate = 3e-3
muon_lr = 3.6e-3
schedule = "trapezoid"
warmup_iters = 100
min_lr = 0.0
max_iters = 20_000  # ten billion tokens

eval_interval = 500
eval_iters = 200
