# Aims at the validation loss of train_shakespeare_char.py, or below, in less time. For one GPU; not run yet:
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_fast_gpu.py

out_dir = "out-shakespeare-fast-gpu"
dataset = "shakespeare_char"

# At most the 10.6 million parameters of train_shakespeare_char.py.
arch = "modern"
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

batch_size = 64
block_size = 256
gradient_accumulation_steps = 1

optimizer = "muon"
learning_rate = 1e-2  # of embeddings and gains
muon_lr = 5e-3
muon_momentum = 0.9
schedule = "trapezoid"
warmup_iters = 20
min_lr = 0.0
max_iters = 600

eval_interval = 100
eval_iters = 50
always_save_checkpoint = False
