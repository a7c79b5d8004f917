# OpenAI's largest GPT-2 goes on learning, on Shakespeare's plays; a smaller one fits a smaller GPU:
#   python train.py config/finetune_shakespeare.py --init_from=gpt2

import time

init_from = "gpt2-xl"
dataset = "shakespeare"
out_dir = "out-shakespeare"
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = f"ft-{time.time()}"

# 32 rows of 1,024 tokens a step: the 302 thousand tokens of the dataset pass about twice in 20 steps.
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # overfitting starts early; only the best is wanted
