# Qwen3 of 0.6 billion parameters goes on learning, on Shakespeare's plays in its own tokens; meant for one GPU of 24 GB,
# on which it has not been run yet:
#   python data/shakespeare/prepare.py --tokenizer=Qwen/Qwen3-0.6B --out=data/shakespeare_qwen3
#   python train.py config/finetune_qwen3.py

init_from = "Qwen/Qwen3-0.6B"
dataset = "shakespeare_qwen3"
out_dir = "out-shakespeare-qwen3"
wandb_project = "shakespeare"
wandb_run_name = "ft-qwen3-0.6B"

# 32 rows of 1,024 tokens a step: the roughly 300 thousand tokens of the dataset pass about twice in 20 steps. The logits
# of a row, over 151,936 ids, take more than a gigabyte, so rows come one by one.
block_size = 1024
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 1e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # overfitting starts early; only the best is wanted
