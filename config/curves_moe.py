"""The default experiment with 8 experts, 2 for each position, `make moe`. It has as many active
parameters as config/curves.py, plus the router and norms."""

n_layer = 2
n_head = 1
n_embd = 64
ff_dim = 96  # two experts are as wide as the dense model's MLP
qk_norm = True
n_expert = 8
top_k = 2
block_size = 128
total_batch = 64 * 128
max_steps = 1500
warmup_steps = 100
learning_rate = 4e-3  # see results/moe
bag_size = 2
superposition_ratio = 0.3
eval_interval = 150
eval_positions = 262144
compile = "on"
