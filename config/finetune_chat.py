# Fine-tune a pretrained model on your own conversations: JSON lines with messages, or with prompt and completion.
#   python data/prepare.py talks.jsonl --chat=True --tokenizer=gpt2 --out=data/chat
#   python train.py config/finetune_chat.py
#   python sample.py --out_dir=out-chat --chat=True --interactive=True
# Another model needs its own tokenizer, which brings its chat template: --tokenizer=Qwen/Qwen3-0.6B above, and here
# --init_from=Qwen/Qwen3-0.6B. Tested only on small models; the learning rate is a usual one, not tuned by us.

init_from = "gpt2"
dataset = "chat"
out_dir = "out-chat"

# 32 rows of 1,024 tokens per step; only the answers count in the loss. train.py prints the number of epochs at the
# start; two or three are enough.
block_size = 1024
batch_size = 4
gradient_accumulation_steps = 8
row_order = "epoch"
max_iters = 200
learning_rate = 2e-5
warmup_iters = 10
weight_decay = 0.0

eval_interval = 20
eval_iters = 0
always_save_checkpoint = False  # keep the best, not the last
