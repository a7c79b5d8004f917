# Evaluate OpenAI's GPT-2 (774M parameters) on both splits of OpenWebText; trains nothing:
#   python train.py config/eval_gpt2_large.py

init_from = "gpt2-large"
dataset = "openwebtext"
eval_only = True
eval_iters = 500
batch_size = 8
wandb_log = False
