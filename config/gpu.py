"""Baseline against TST on one large GPU in minutes: a byte model with 3.3 million parameters.

3,000 steps of 32,768 positions are 98M bytes for the baseline, 30 per parameter and less than one epoch; with
s 4 and r 0.3 TST reads 1.9 times as much. Run by examples/gpu.sh.
"""

dataset = "python_source"
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
