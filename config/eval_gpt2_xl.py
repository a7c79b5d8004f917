# Evaluate OpenAI's GPT-2 (1,558M parameters) on both splits of OpenWebText; trains nothing:
#   python train.py config/eval_gpt2_xl.py

init_from = "gpt2-xl"
dataset = "openwebtext"
eval_only = True
eval_iters = 500
batch_size = 8
wandb_log = False
