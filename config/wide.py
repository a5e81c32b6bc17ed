"""config/curves.py with four times the width and twice the depth and context, to measure speed: 3.3 million
parameters. Its learning rate was not swept."""

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
total_batch = 64 * 256
batch_size = 16
max_steps = 1500
warmup_steps = 200
decay_ratio = 0.2
learning_rate = 4e-3
bag_size = 2
superposition_ratio = 0.3
eval_positions = 262144
compile = "on"
