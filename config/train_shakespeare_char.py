# A character-level GPT of ten million parameters on tiny Shakespeare, for a GPU:
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

learning_rate = 1e-3  # decays to a tenth of this at max_iters
warmup_iters = 100
max_iters = 5000
beta2 = 0.99  # batches are small, so average the second moment over more of them

# It overfits one megabyte of text soon: evaluate often, and keep only the best.
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
