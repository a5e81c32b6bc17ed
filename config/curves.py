"""The default experiment: a small model that sees much text, for minutes on a CPU.

140 thousand parameters and 176 bytes of text for each (with TST 1.3 times that): TST pays where the model is the
limit and text is not.
Run by `make curves`, see README.md.
"""
dataset = "python_source"
n_layer = 2
n_head = 1
n_embd = 64
qk_norm = True  # without it the best learning rate is lower and the loss higher, on both sides
block_size = 128
total_batch = 64 * 128
max_steps = 3000
warmup_steps = 100
learning_rate = 8e-3  # the best of the baseline, and of s = 2 (README, "The sweep")
decay_ratio = 0.3
bag_size = 2
superposition_ratio = 0.3
eval_interval = 300
eval_positions = 262144
compile = "on"
