# Aims at a validation loss of 3.28 on FineWeb, the target of the community's speedruns for a model of GPT-2's size. For
# eight large GPUs; not run yet:
#   python data/openwebtext/prepare.py --repo=HuggingFaceFW/fineweb --under=sample/10BT --out=data/fineweb
#   torchrun --standalone --nproc_per_node=8 train.py config/train_fineweb.py
# The speedruns validate on other tokens, so a loss on this split is near theirs, not equal.

out_dir = "out-fineweb"
dataset = "fineweb"
row_order = "epoch"  # reads no text twice

arch = "modern"
n_layer = 12
n_head = 6
head_dim = 128
n_embd = 768

# 480 rows of 1,024 tokens per step.
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
max_iters = 6000  # three billion tokens

eval_interval = 500
eval_iters = 200
