"""The paper's 10B-A1B mixture of experts: 10,132,484,608 parameters, 1.02B of them active without the input
embedding. The paper does not state the shape; this one keeps Qwen3-30B-A3B's ratios. Its states,
162 GB, are spread over the GPUs (FSDP2): 8 of 80 GB hold them. On several nodes, see examples/slurm.sh.

    python data/dclm/prepare.py --tokens=1000B --encoding=path/to/llama-3/tokenizer.model
    python data/fineweb_edu/prepare.py --folder=data --tokens=1000B --encoding=path/to/llama-3/tokenizer.model
    torchrun --standalone --nproc_per_node=8 train.py config/moe_10b_a1b.py --out_dir=out/10b_tst

TST reads 2.0e12 tokens, one half of them from each corpus.

Not run on GPUs yet: on two CPU ranks, one layer at this width has been.

Paper, DCLM and FineWeb-Edu 50/50: baseline 2.252 after 125k steps (12,311 B200-hours), TST (s 16, r 0.25)
2.236 after 50k steps (4,768 B200-hours).
"""

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
balance_coef = 0.001
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
