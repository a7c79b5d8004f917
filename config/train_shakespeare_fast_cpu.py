# Reaches the validation loss of train_shakespeare_char_cpu.py, 1.89 on tiny Shakespeare, 17 to 24 times sooner than nanoGPT:
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_fast_cpu.py
# runs/time_to_loss_cpu has the measurement, and what each choice gains.

out_dir = "out-shakespeare-fast-cpu"
dataset = "shakespeare_char"
device = "cpu"
compile = False

arch = "modern"
n_layer = 2
n_head = 4
n_kv_head = 1
n_embd = 128
n_inner = 256
look_back = True  # a first layer that need not learn where the last tokens are

ngram_targets = 5  # learn what followed the last four characters anywhere in the text
batch_size = 24
block_size = 64
gradient_accumulation_steps = 1

optimizer = "muon"
learning_rate = 2.2e-2  # of embeddings and gains
muon_lr = 2.4e-2
muon_momentum = 0.7  # a short run wants a short memory
beta1 = 0.7
beta2 = 0.98
grad_clip = 0.0
schedule = "trapezoid"
warmup_iters = 5
min_lr = 0.0
max_iters = 58

eval_interval = 0  # only at the end, on the whole validation split
eval_iters = 0
eval_train = False
sample_chars = 0  # sample.py writes more
