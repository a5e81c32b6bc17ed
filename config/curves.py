"""The default experiment: a small model that sees much text, for minutes on a CPU.

140 thousand parameters and 117 bytes of text for each (with TST 1.3 times that): TST pays where the model is the
limit and text is not.
Run by `make curves`, see README.md.
"""
dataset = "python_source"
n_layer = 2
n_head = 1
n_embd = 64
block_size = 128
total_batch = 64 * 128
max_steps = 2000
warmup_steps = 100
learning_rate = 3e-3  # the best of the baseline, and of s = 2 (README, "The sweep")
bag_size = 2
superposition_ratio = 0.3
eval_interval = 200
eval_positions = 262144
compile = "on"
