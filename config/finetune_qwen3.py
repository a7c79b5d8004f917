# Fine-tune Qwen3-0.6B on Shakespeare's plays, in its own tokens. For one GPU with 24 GB; not run yet:
#   python data/shakespeare/prepare.py --tokenizer=Qwen/Qwen3-0.6B --out=data/shakespeare_qwen3
#   python train.py config/finetune_qwen3.py

init_from = "Qwen/Qwen3-0.6B"
dataset = "shakespeare_qwen3"
out_dir = "out-shakespeare-qwen3"
wandb_project = "shakespeare"
wandb_run_name = "ft-qwen3-0.6B"

# 32 rows of 1,024 tokens per step, so 20 steps are about two epochs of some 300 thousand tokens. The logits of a row,
# over 151,936 ids, take 0.6 GB, and there are three copies of them at a time, so a micro-batch is one row.
block_size = 1024
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 1e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # it overfits soon: keep only the best
