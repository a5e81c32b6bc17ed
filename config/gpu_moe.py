"""The mixture-of-experts twin of gpu_english.py: 32 experts of which 4 together are as wide as its MLP, in
the manner of Qwen3 (qk-norm, dropless, load-balancing loss). Part moe of tools/gpu.py."""

dataset = "english"
n_layer = 6
n_head = 6
n_embd = 384
ff_dim = 256
qk_norm = True
n_expert = 32
top_k = 4
block_size = 512
total_batch = 128 * 512
batch_size = 128
max_steps = 4000
warmup_steps = 300
learning_rate = 2e-3
bag_size = 4
superposition_ratio = 0.3
eval_interval = 250
eval_positions = 2**20
log_interval = 50
save_interval = 1000
