"""Baseline against TST on one large GPU in minutes, see examples/gpu.sh: 3.3 million parameters, 30 bytes of
text for each, less than one epoch; TST reads 1.9 times as much."""

n_layer = 4
n_head = 4
n_embd = 256
block_size = 512
total_batch = 64 * 512
max_steps = 3000
warmup_steps = 250
decay_ratio = 0.2
learning_rate = 2e-3  # the best of three for the baseline and for s 4
bag_size = 4
superposition_ratio = 0.3
eval_interval = 250
eval_positions = 2**19
log_interval = 50
