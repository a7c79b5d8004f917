# A ten-million-parameter network that learns to spell Shakespeare:
#   python train.py config/train_shakespeare_char.py

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

batch_size = 64
block_size = 256
gradient_accumulation_steps = 1

learning_rate = 1e-3  # falls to a tenth of it at max_iters
warmup_iters = 100
max_iters = 5000
beta2 = 0.99  # steps are small, so the second moment averages over more of them

# One megabyte of text is soon learned by heart: look often, and keep what validates best.
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
