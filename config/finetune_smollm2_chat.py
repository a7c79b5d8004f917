# Teach SmolLM2-135M-Instruct to answer like a lighthouse keeper: about five minutes on two CPU cores.
#   python data/lighthouse_chat/prepare.py
#   python data/prepare.py data/lighthouse_chat/conversations.jsonl --chat=True --val_share=0.1 \
#       --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct --out=data/lighthouse_smollm2
#   python train.py config/finetune_smollm2_chat.py

init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"  # or a GGUF file
dataset = "lighthouse_smollm2"
out_dir = "out-lighthouse-smollm2"
wandb_project = "lighthouse"
wandb_run_name = "ft-smollm2-135M-instruct"

block_size = 256
batch_size = 4
gradient_accumulation_steps = 1
loss_chunk = 256  # logits of 1,024 tokens would take 200 MB, and three copies exist at a time
mask_documents = True  # a conversation does not see the one before
max_iters = 30
learning_rate = 2e-4
warmup_iters = 3

eval_interval = 30  # before and after
eval_iters = 1
log_interval = 5
