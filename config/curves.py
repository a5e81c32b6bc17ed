"""The default experiment, `make curves`: minutes on a CPU. 140 thousand parameters and 176 bytes of text for
each (TST reads 1.3 times that): TST pays off when the model is the bottleneck, not the text."""

n_layer = 2
n_head = 1
n_embd = 64
block_size = 128
total_batch = 128 * 128
max_steps = 1500
warmup_steps = 200
decay_ratio = 0.2
learning_rate = 8e-3  # the best of three for both sides (results/pinned)
bag_size = 2
superposition_ratio = 0.3
eval_positions = 262144
compile = "on"
