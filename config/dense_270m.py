"""The paper's 270M model, 267,225,408 parameters, shape inferred. Paper (DCLM): baseline 3.212, TST 3.142;
with 100k steps 3.092 and 3.048. Prepare the text with

    python data/dclm/prepare.py --tokens=105B --encoding=path/to/llama-3/tokenizer.model
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
