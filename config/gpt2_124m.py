"""nanoGPT's default, GPT-2 (124M), with the blocks of this repository: 162,148,608 parameters, 123,551,232
without the input embedding, which is not tied to the head."""

dataset = "openwebtext"  # nanoGPT's train.bin and val.bin, copied to data/openwebtext/
n_layer = 12
n_head = 12
n_embd = 768
ff_dim = 2048  # three matrices of this width are as many weights as GPT-2's two of 3072
block_size = 1024
total_batch = 8 * 64 * 1024  # half a million positions
batch_size = 64
max_steps = 20000
warmup_steps = 2000
learning_rate = 6e-4
bag_size = 6
superposition_ratio = 0.3
eval_interval = 500
eval_positions = 2**20
save_interval = 1000
