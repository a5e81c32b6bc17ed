"""The paper's 10B-A1B mixture, 10,132,484,608 parameters, shape inferred; 162 GB of states, not run here.
Paper (DCLM, FineWeb-Edu): baseline 2.252 after 125k steps, TST 2.236 after 50k, having read 2.0e12 tokens."""

dataset = "dclm:0.5,fineweb_edu:0.5"
n_layer = 28
n_head = 16
n_kv_head = 4
n_embd = 1536
head_dim = 128
ff_dim = 576
qk_norm = True
rope_theta = 1e6
norm_eps = 1e-6
n_expert = 128
top_k = 8
block_size = 4096
total_batch = 2048 * 4096  # 8M positions
batch_size = 1
checkpoint_activations = True
parallel = "fsdp"
max_steps = 50000
warmup_steps = 2000
learning_rate = 3e-4
bag_size = 16
superposition_ratio = 0.25
eval_interval = 500
eval_positions = 2**21
save_interval = 1000
