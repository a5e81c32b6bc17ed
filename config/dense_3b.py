"""The paper's 3B model, in the shape of SmolLM3-3B: 3,337,766,912 parameters; block_size is inferred.
Commands as in dense_270m.py. With DDP a GPU holds weights, gradients and moments in float32, 16 bytes a
parameter: 53 GB; with --parallel=fsdp its part of them.

Paper, DCLM, Llama-3 tokens, 20k steps: baseline 2.808, TST (s 6, r 0.3) 2.676, which the baseline reaches
after 36k steps (2.677). At equal data TST loses: 2.676 against 2.640.
"""

dataset = "dclm"
n_layer = 36
n_head = 16
n_kv_head = 4
n_embd = 2048
ff_dim = 11008
block_size = 2048
total_batch = 1024 * 2048  # 2M positions
batch_size = 4
checkpoint_activations = True
max_steps = 20000
warmup_steps = 2000
learning_rate = 2e-4
bag_size = 6
superposition_ratio = 0.3
eval_interval = 500
eval_positions = 2**21
save_interval = 1000
