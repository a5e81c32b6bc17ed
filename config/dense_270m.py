"""The paper's 270M model: 267,225,408 parameters. Its shape is inferred (SmolLM2-135M with n_kv_head = n_head
is the one that adds up), and so is block_size.

Paper, DCLM, Llama-3 tokens, 20k steps: baseline 3.212, TST (s 6, r 0.3) 3.142; 100k steps: 3.092, 3.048.

    python data/dclm/prepare.py --tokens=105B --encoding=path/to/llama-3/tokenizer.model
    torchrun --standalone --nproc_per_node=8 train.py config/dense_270m.py --out_dir=out/270m_tst
    and the baseline with --bag_size=1 --out_dir=out/270m_baseline, which reads 42B tokens; TST 2.5 times that
"""

dataset = "dclm"
n_layer = 30
n_head = 9
n_embd = 576
ff_dim = 1536
block_size = 2048
total_batch = 1024 * 2048  # 2M positions
batch_size = 16
max_steps = 20000
warmup_steps = 2000
learning_rate = 2e-3
bag_size = 6
superposition_ratio = 0.3
eval_interval = 500
eval_positions = 2**21
save_interval = 1000
