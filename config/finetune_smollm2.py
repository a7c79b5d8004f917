# Fine-tune SmolLM2-135M on Shakespeare's plays, in its own tokens: about five minutes on two CPU cores.
#   python data/shakespeare/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M --out=data/shakespeare_smollm2
#   python train.py config/finetune_smollm2.py
# The rate, and the rows of a step, were searched in runs/finetune; the steps are what five minutes allow.

init_from = "HuggingFaceTB/SmolLM2-135M"  # or a GGUF file
dataset = "shakespeare_smollm2"
out_dir = "out-shakespeare-smollm2"
wandb_project = "shakespeare"
wandb_run_name = "ft-smollm2-135M"

block_size = 256
batch_size = 4
gradient_accumulation_steps = 1
loss_chunk = 256  # logits of 1,024 tokens would take 200 MB, and three copies exist at a time
max_iters = 40
learning_rate = 2e-4
warmup_iters = 4

eval_interval = 40  # before and after
eval_iters = 2
log_interval = 5
