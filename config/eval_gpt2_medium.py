# Evaluate OpenAI's GPT-2 (355M parameters) on both splits of OpenWebText; trains nothing:
#   python train.py config/eval_gpt2_medium.py

init_from = "gpt2-medium"
dataset = "openwebtext"
eval_only = True
eval_iters = 500
batch_size = 8
wandb_log = False
