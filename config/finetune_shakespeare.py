# Fine-tune OpenAI's largest GPT-2 on Shakespeare's plays. On a smaller GPU take a smaller model:
#   python train.py config/finetune_shakespeare.py --init_from=gpt2

import time

init_from = "gpt2-xl"
dataset = "shakespeare"
out_dir = "out-shakespeare"
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = f"ft-{time.time()}"

# 32 rows of 1,024 tokens per step, so 20 steps are about two epochs of 302 thousand tokens.
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it overfits soon: keep only the best
