"""The paper's 600M model, 600,208,320 parameters, shape inferred; text as for dense_270m.py. Paper (DCLM):
baseline 3.019, TST 2.943."""

dataset = "dclm"
n_layer = 32
n_head = 15
n_embd = 960
ff_dim = 2560
block_size = 2048
total_batch = 1024 * 2048  # 2M positions
batch_size = 16
max_steps = 20000
warmup_steps = 2000
learning_rate = 1e-3
bag_size = 6
superposition_ratio = 0.3
eval_interval = 500
eval_positions = 2**21
save_interval = 1000
