# A smaller train_shakespeare_char.py, for a laptop without a GPU:
#   python train.py config/train_shakespeare_char_cpu.py

out_dir = "out-shakespeare-char-cpu"
dataset = "shakespeare_char"
device = "cpu"
compile = False

n_layer = 4
n_head = 4
n_embd = 128
gelu = "erf"  # nanoGPT's; on an x86 CPU torch takes several times as long for GPT-2's tanh form
dropout = 0.0

batch_size = 12
block_size = 64
gradient_accumulation_steps = 1

learning_rate = 1e-3  # decays to a tenth of this at max_iters
warmup_iters = 100
max_iters = 2000
beta2 = 0.99

eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False
