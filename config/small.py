"""The scale of results/paper: config/curves.py with half the rows and two thirds of the steps, for hundreds
of runs on two CPU cores. 58 bytes of text for each parameter."""

n_layer = 2
n_head = 1
n_embd = 64
block_size = 128
total_batch = 64 * 128
max_steps = 1000
warmup_steps = 150
decay_ratio = 0.2
learning_rate = 8e-3
bag_size = 2
superposition_ratio = 0.3
eval_positions = 262144
save_interval = 250
compile = "on"
