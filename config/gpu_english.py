"""Baseline against TST on one large GPU in minutes: a byte model of 11M parameters, 208 MB of English prose.

6,000 steps of 64k positions are 393M bytes, 1.9 epochs and 36 bytes a parameter, for the baseline; with s = 4
and r = 0.3 TST reads 1.9 times as much. Learning rate and s are guesses until they have been swept:

    python -m tools.gpu TEXT --parts=pair,sweep,bags,seeds,long
"""

dataset = "english"
n_layer = 6
n_head = 6
n_embd = 384
ff_dim = 1024
block_size = 512
total_batch = 128 * 512
batch_size = 128
max_steps = 6000
warmup_steps = 300
learning_rate = 3e-3
bag_size = 4
superposition_ratio = 0.3
eval_interval = 250
eval_positions = 2**20
log_interval = 50
save_interval = 1000
