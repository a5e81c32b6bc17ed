"""model.py against independent computations: counts by hand, plain loops, float64, complex numbers."""

import ast
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import model as model_module
from model import GPT, MLP, GPTConfig, Init, MoE
from nanotst.checkpoint import model_config
from nanotst.configurator import parse, read_file
from nanotst.kernels import use_twins
from nanotst.machine import Machine
from nanotst.optim import make_optimizer
from nanotst.parallel import init_weights
from train import Config

ROOT = Path(model_module.__file__).parent

SHAPE = dict(vocab_size=50, block_size=12, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ff_dim=48)
DENSE, EXPERTS = {}, dict(n_expert=4, top_k=2, qk_norm=True)
dense_and_moe = pytest.mark.parametrize("kind", [DENSE, EXPERTS], ids=["dense", "moe"])


def gpt(**changes):
    return GPT(GPTConfig(**{**SHAPE, **changes}))


def tokens(*shape):
    return torch.randint(50, shape)


def gradients(model, *args):
    model.zero_grad()
    model(*args)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def make_lively(model):
    """Weights as large as after training: at initialisation attention is too even to show a leak."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.dim() > 1 else p.add_(0.3 * torch.randn_like(p))
    return model


# ---- shapes and counts

PAPER = {  # layers, width, heads, key/value heads, head_dim, ff_dim, parameters, active without embedding
    "dense_270m": (30, 576, 9, 9, 64, 1536, 267_225_408, 193_350_000),
    "dense_600m": (32, 960, 15, 15, 64, 2560, 600_208_320, 477_080_000),
    "dense_3b": (36, 2048, 16, 4, 128, 11008, 3_337_766_912, 3_075_100_000),
    "moe_10b_a1b": (28, 1536, 16, 4, 128, 576, 10_132_484_608, 1_017_340_000),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_configs_of_the_papers_models_have_their_shapes_and_numbers_of_parameters(name):
    *shape, total, active = PAPER[name]
    file = ROOT / "config" / f"{name}.py"
    config = model_config(dataclasses.asdict(parse(Config, [str(file)])), {"vocab_size": 128_256})
    keys = ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "ff_dim")
    assert [getattr(config, key) for key in keys] == shape and not config.tie_embeddings
    experts = (128, 8, True) if name.startswith("moe") else (0, 0, False)
    assert (config.n_expert, config.top_k, config.qk_norm) == experts
    with torch.device("meta"):
        model = GPT(config)
    assert model.n_params() == total
    assert model.n_params(True, without=("embedding",)) == pytest.approx(active, rel=1e-4)
    text = " ".join(ast.get_docstring(ast.parse(file.read_text())).split())
    assert f"{total:,} parameters" in text


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*.py")), ids=lambda file: file.stem)
def test_every_config_builds_a_model(file):
    knobs = dataclasses.asdict(parse(Config, [str(file)]))
    assert read_file(file).items() <= knobs.items()
    with torch.device("meta"):
        GPT(model_config(knobs, {"vocab_size": 50_257}))


V, L, C, F_, D, E, TOP = 50, 12, 32, 48, 8, 4, 2
ATTENTION = C * (4 + 2 + 2) * D + 4 * D * C  # query, key, value, out
EXPERT = 3 * C * F_


@pytest.mark.parametrize(
    "changes, total, in_products",
    [
        ({}, 0, 0),
        (dict(head_dim=2 * D), 2 * ATTENTION, 2 * ATTENTION),
        (dict(attention_window=5), 0, 0),
        (dict(tie_embeddings=True), -V * C, 0),
        (EXPERTS, 2 * (C * E + (E - 1) * EXPERT + 2 * D), 2 * (C * E + (TOP - 1) * EXPERT)),
    ],
)
def test_parameters_and_flops_by_hand(changes, total, in_products):
    """As they differ from the dense model. FLOPs of a position know nothing of bags. Padding rows are not
    counted."""
    model = gpt(**changes)
    blocks = 2 * (ATTENTION + EXPERT)
    assert model.n_params() == 2 * V * C + blocks + 2 * 2 * C + C + total
    width = 4 * model.config.head_dim  # H*D
    seen = changes.get("attention_window", L)
    attention = 2 * 2 * (2 * width * seen)  # layers, (scores, sum), FLOPs of H*D*seen multiply-adds
    # backward is twice the forward
    assert model.flops_per_position() == 3 * (2 * (V * C + blocks + in_products) + attention)


def test_initialisation():
    model = gpt(n_embd=256, ff_dim=512, n_layer=8, vocab_size=512, n_expert=2, top_k=1, head_dim=32)
    base = 0.5 / math.sqrt(256)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert p.eq(1).all()
        else:
            residual = name.endswith(("attn.out.weight", "mlp.down"))
            assert p.std().item() == pytest.approx(base / 4 if residual else base, rel=0.08), name
            assert abs(p.mean().item()) < base / 5, name


def test_weights_of_some_parts_are_drawn_again_and_the_others_stay():
    model = gpt()
    before = {name: p.clone() for name, p in model.named_parameters()}
    init_weights(model, ("embed", "blocks.1.mlp"))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"embed.weight", "blocks.1.mlp.gate_up.weight", "blocks.1.mlp.down.weight"}


class Gated(MLP):
    """A fork's module, with a scale, a matrix, and a layer of torch's own if asked for."""

    def __init__(self, config, layer=False):
        super().__init__(config)
        self.gate = torch.nn.Parameter(torch.tensor(9.0))
        self.mix = torch.nn.Parameter(torch.ones(32, 32))
        self.init = {"gate": 0.5, "mix": Init("matrix", torch.nn.init.eye_)}
        if layer:
            self.norm = torch.nn.LayerNorm(32)

    def forward(self, x):
        return self.gate * super().forward(x @ self.mix)


@pytest.fixture
def forked(monkeypatch):
    monkeypatch.setattr(model_module, "MLP", Gated)
    return gpt()


def test_a_forks_own_initial_values_and_kinds(forked):
    assert forked.blocks[1].mlp.gate.item() == 0.5
    assert torch.equal(forked.blocks[1].mlp.mix, torch.eye(32))
    plain = 2 * V * C + 2 * (ATTENTION + EXPERT + 2 * C) + C
    assert forked.n_params() == plain + 2 * (1 + 32 * 32)
    added = 6 * 2 * 32 * 32  # the matrices alone
    model_module.MLP = MLP
    assert forked.flops_per_position() == gpt().flops_per_position() + added


def test_weight_decay_and_muon_go_by_kind_not_by_dimensions(forked):
    c = Config(optimizer="muon", weight_decay=0.3, learning_rate=0.01)
    matrices, rest, scales = make_optimizer(forked, c, "cpu").param_groups
    names = {id(p): name for name, p in forked.named_parameters()}
    of = lambda group: {names[id(p)].split(".", 2)[-1] for p in group["params"]}
    matrix = {"attn.qkv.weight", "attn.out.weight", "mlp.gate_up.weight", "mlp.down.weight"}
    assert of(matrices) == matrix | {"mlp.mix"}
    assert [names[id(p)] for p in rest["params"]] == ["embed.weight", "head.weight"]
    assert {"mlp.gate", "attn_norm.weight", "mlp_norm.weight"} <= of(scales)
    assert [g["weight_decay"] for g in (matrices, rest, scales)] == [0.3, 0.3, 0]


def test_muon_leaves_routers_and_experts_to_adamw():
    mixture = gpt(**EXPERTS)
    matrices = make_optimizer(mixture, Config(optimizer="muon"), "cpu").param_groups[0]["params"]
    names = {id(p): name for name, p in mixture.named_parameters()}
    found = {names[id(p)].split(".", 2)[-1] for p in matrices}
    assert found == {"attn.qkv.weight", "attn.out.weight"} and len(matrices) == 4


def test_a_parameter_without_an_initial_value_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(model_module, "MLP", lambda config: Gated(config, layer=True))
    with pytest.raises(ValueError, match="blocks.0.mlp.norm.weight has no initial.*LayerNorm"):
        gpt()


def test_buffers_are_filled_as_in_a_new_model():
    """Of a model that was built without memory, where they hold anything."""
    model = gpt(balance_bias=True, **EXPERTS)
    wanted = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for buffer in model.buffers():
        buffer.fill_(torch.nan)
    model.init_buffers()
    assert len(wanted) == 4
    assert all(torch.equal(b, wanted[name]) for name, b in model.named_buffers())


IMPOSSIBLE = [
    (dict(head_dim=7), "head_dim"),
    (dict(n_kv_head=3), "n_kv_head"),
    (dict(attention_window=-1), "attention_window"),
    (dict(n_expert=4, top_k=5), "top_k"),
    (dict(n_expert=4, top_k=2, ff_dim=52), "multiples of 8"),
    (dict(n_expert=4, top_k=2, n_embd=36, head_dim=8), "multiples of 8"),
]


@pytest.mark.parametrize("wrong, word", IMPOSSIBLE)
def test_impossible_shapes_are_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        GPTConfig(**{**SHAPE, **wrong})


def test_zeros_in_the_shape_are_filled_in():
    config = GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=4, n_embd=96)
    assert (config.n_kv_head, config.head_dim, config.ff_dim) == (4, 24, 256)


# ---- the parts


def loop_model(model, x):
    """A Llama written down plainly, one head and one position at a time, in float64: ids (L,) -> (L, V)."""
    p = {name: value.double() for name, value in model.state_dict().items()}
    c = model.config

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def turn(x, position):
        i = torch.arange(c.head_dim // 2).double()
        angle = position * c.rope_theta ** (-2 * i / c.head_dim)
        z = torch.complex(*x.chunk(2)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag))

    x = p["embed.weight"][x]
    for n in range(c.n_layer):
        b = f"blocks.{n}."
        h = norm(x, p[b + "attn_norm.weight"]) @ p[b + "attn.qkv.weight"].T
        heads = c.n_head, c.n_kv_head, c.n_kv_head
        q, k, v = h.unflatten(-1, (-1, c.head_dim)).split(heads, dim=1)
        if c.qk_norm:
            q, k = norm(q, p[b + "attn.q_norm.weight"]), norm(k, p[b + "attn.k_norm.weight"])
        out = torch.zeros(len(x), c.n_head, c.head_dim).double()
        for i in range(len(x)):
            for head in range(c.n_head):
                shared = head // (c.n_head // c.n_kv_head)
                seen = range(max(0, i + 1 - (c.attention_window or i + 1)), i + 1)
                scores = [turn(q[i, head], i) @ turn(k[j, shared], j) for j in seen]
                p_seen = (torch.stack(scores) / math.sqrt(c.head_dim)).softmax(0)
                out[i, head] = p_seen @ v[seen.start : i + 1, shared]
        x = x + out.flatten(1) @ p[b + "attn.out.weight"].T
        h = norm(x, p[b + "mlp_norm.weight"]) @ p[b + "mlp.gate_up.weight"].T
        gate, up = h.chunk(2, dim=-1)
        x = x + (gate / (1 + (-gate).exp()) * up) @ p[b + "mlp.down.weight"].T
    return (norm(x, p["norm.weight"]) @ p["head.weight"].T)[:, : c.vocab_size]


@pytest.mark.parametrize("norm_eps", [1e-5, 0.5])  # one that no digit hides, in each of the norms
@pytest.mark.parametrize("qk_norm, window", [(False, 0), (True, 0), (False, 5)])
def test_dense_model_equals_a_plain_llama_in_float64(qk_norm, norm_eps, window):
    shape = dict(qk_norm=qk_norm, norm_eps=norm_eps, attention_window=window, rope_theta=100.0)
    model, x = make_lively(gpt(**shape)), tokens(12)
    wanted = loop_model(model, x)
    assert_close(model(x[None])[0].double(), wanted, rtol=1e-4, atol=1e-4)
    exact = model.double()
    exact.cos, exact.sin = exact_rotary(12, 8, 100.0)  # the buffers are float32's
    assert_close(exact(x[None])[0], wanted, rtol=1e-10, atol=1e-10)


def exact_rotary(block_size, head_dim, theta):
    p, i = torch.arange(block_size).double(), torch.arange(head_dim // 2).double()
    angle = p[:, None, None] * theta ** (-2 * i / head_dim)
    return angle.cos(), angle.sin()


def test_a_checkpoint_holds_parameters_and_the_balancing_bias_alone():
    """Rotary tables follow from the configuration; stored, they would tie it to one block_size."""
    model = gpt(balance_bias=True, **EXPERTS)
    biases = {f"blocks.{n}.mlp.bias" for n in range(2)}
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} | biases


def test_rotary_tables_are_computed_in_float32_and_rounded_once():
    """At position 4,095 an angle in bfloat16 is off by whole turns. A model in bfloat16 holds the rounded
    cosine of the exact angle."""
    exact = exact_rotary(4096, 8, 10000.0)
    model = gpt(block_size=4096)
    assert model.cos.dtype == model.sin.dtype == torch.float32
    for table, wanted in zip((model.cos, model.sin), exact):
        assert_close(table.double(), wanted, rtol=0, atol=5e-4)  # an angle of 4,095 in float32
        assert_close(table[:100].double(), wanted[:100], rtol=0, atol=1e-5)
    model = model.bfloat16()
    for table, wanted in zip((model.cos, model.sin), exact):
        assert_close(table.double(), wanted, rtol=2**-8, atol=5e-4)


# ---- causality


@dense_and_moe
@pytest.mark.parametrize("s", [1, 3])
def test_a_bag_changes_no_output_before_it(s, kind):
    """Whatever is done to bag j+1, the outputs at positions <= j stay."""
    model, bags = make_lively(gpt(**kind)), tokens(1, 12, s)
    before = model(bags)
    for j in range(11):
        changed = bags.clone()
        changed[0, j + 1] = (bags[0, j + 1] + 1) % 50
        after = model(changed)
        assert_close(after[:, : j + 1], before[:, : j + 1], rtol=1e-4, atol=1e-4)
        assert (
            (after - before)[:, j + 1 :].abs().amax(-1).gt(0.01).all()
        )  # the test can see a change


def test_bags_sit_at_positions_0_to_L():
    """A bag counts as one position: bags of s identical tokens are, to the model, those tokens."""
    model, x = gpt(), tokens(2, 12)
    assert_close(model(x[..., None].expand(2, 12, 5)), model(x))
    assert torch.equal(model(x[..., None]), model(x))


# ---- the loss of the model


@dense_and_moe
def test_loss_is_the_loop_of_cross_entropies_of_the_logits(kind):
    model, bags, labels = gpt(**kind), tokens(2, 12, 3), tokens(2, 12, 3)
    weights = torch.tensor([0.5, 0.3, 0.2])
    logits = model(bags).flatten(0, 1)
    losses = [F.cross_entropy(logits, y.flatten()) for y in labels.unbind(-1)]
    assert_close(model(bags, labels, weights)[0], (weights * torch.stack(losses)).sum())


def test_tokens_of_a_bag_that_count_nothing_change_nothing():
    model, bags, share = gpt(), tokens(2, 12, 3), torch.tensor([0.0, 0.25, 0.75]).expand(2, 12, 3)
    x = (model.embed.weight[bags] * share[..., None]).sum(2)
    model.embed.register_forward_hook(lambda _, args, out: assert_close(out, x))
    logits = model(bags, share=share)
    bags[..., 0] = tokens(2, 12)
    assert torch.equal(model(bags, share=share), logits)


def test_the_source_is_plain_torch():
    """No autograd.Function, no kernel, no branch on the device: those are twins, in nanotst/."""
    nodes = list(ast.walk(ast.parse(Path(model_module.__file__).read_text(encoding="utf-8"))))
    words = {
        str(getattr(n, key)) for n in nodes for key in ("attr", "id", "value") if hasattr(n, key)
    }
    assert not {"autograd", "Function", "is_cuda", "is_cpu", "is_compiling", "cpu", "cuda"} & words
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    assert "nanotst" not in " ".join(map(ast.unparse, imports))


def test_zero_head_costs_log_v_in_spite_of_padding():
    """log 50, not log 64."""
    model = gpt()
    torch.nn.init.zeros_(model.head.weight)
    losses = [model(tokens(2, 12, s), tokens(2, 12, s))[0].item() for s in (1, 4)]
    assert losses == pytest.approx([math.log(50)] * 2, rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_padding_of_the_vocabulary_has_no_effect(tied, monkeypatch):
    model = gpt(tie_embeddings=tied)
    monkeypatch.setattr(GPTConfig, "padded_vocab_size", property(lambda self: self.vocab_size))
    bare = gpt(tie_embeddings=tied)
    vocabulary = "embed.weight", "head.weight"
    unpadded = lambda state: {n: t[:50] if n in vocabulary else t for n, t in state.items()}
    bare.load_state_dict(unpadded(model.state_dict()))
    monkeypatch.undo()
    with torch.no_grad():  # whatever the padding holds
        model.head.weight[50:] = 7.0
    x, y = tokens(2, 12, 3), tokens(2, 12, 3)
    assert model(x).shape == (2, 12, 50)
    assert_close(model(x), bare(x))
    padded, wanted = gradients(model, x, y), gradients(bare, x, y)
    assert_close(unpadded(padded), wanted)
    assert not padded["embed.weight"][50:].any() and not padded.get("head.weight", x)[50:].any()


@dense_and_moe
def test_activation_checkpointing_gives_the_same_gradients(kind):
    model = gpt(**kind)
    x, y = tokens(2, 12, 2), tokens(2, 12, 2)
    wanted = gradients(model, x, y)
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model.config.checkpoint_activations = True
    assert_close(gradients(model, x, y), wanted)
    assert len(calls) == 2  # it did run twice
    model.eval()
    assert_close(gradients(model, x, y), wanted)
    assert len(calls) == 3  # once more: only training is short of memory


# ---- compilation


def test_one_graph_per_phase_and_none_after():
    """A graph for bags, one for tokens, whatever the routing and the number of steps. In bfloat16, without
    which grouped matrix products do not compile."""
    counter, loads = CompileCounterWithBackend("aot_eager"), set()
    model = gpt(n_layer=1, **EXPERTS)
    use_twins(model, Machine("cpu", "bfloat16"), [(4, 4)])
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        for s, graphs in ((4, 1), (1, 2)):
            for _ in range(3):
                loss, router = compiled(tokens(2, 12, s), tokens(2, 12, s))
                (loss + router["balance_loss"].mean()).backward()
                assert counter.frame_count == graphs
                loads.add(str(router["load"].tolist()))
        assert len(loads) == 6  # different routings
        x, y = tokens(2, 12, 4), tokens(2, 12, 4)
        wanted = {f"_orig_mod.{n}": g for n, g in gradients(model, x, y).items()}
        assert_close(gradients(compiled, x, y), wanted)


# ---- mixture of experts


def moe(**changes):
    layer = MoE(GPTConfig(**{**SHAPE, **EXPERTS, **changes}))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer


def loop_moe(layer, x):
    """A position at a time, an expert at a time. -> output, how many positions chose each expert."""
    rows, load = [], [0] * len(layer.gate_up)
    for row in x.flatten(0, 1):
        probs = (layer.router.weight @ row).softmax(0)
        top = (probs + (0 if layer.bias is None else layer.bias)).topk(layer.top_k).indices
        y = torch.zeros_like(row)
        for e in top.tolist():
            gate, up = (row @ layer.gate_up[e]).chunk(2)
            y = y + probs[e] / probs[top].sum() * (F.silu(gate) * up @ layer.down[e])
            load[e] += 1
        rows.append(y)
    return torch.stack(rows).view_as(x), torch.tensor(load, dtype=torch.float32)


@pytest.mark.parametrize("balance_bias", [False, True])
@pytest.mark.parametrize("experts, top_k", [(1, 1), (4, 1), (4, 2), (4, 4), (16, 3)])
def test_moe_equals_the_plain_loop_over_experts(experts, top_k, balance_bias):
    """Outputs and every gradient, also where an expert is chosen by nobody (16 experts for 6 positions). The
    balancing bias chooses experts but does not weigh them."""
    layer = moe(n_expert=experts, top_k=top_k, balance_bias=balance_bias)
    x = torch.randn(2, 3, 32, requires_grad=True)
    if balance_bias:
        layer.bias[:3] = 0.5
    upstream = torch.randn(2, 3, 32)
    y, router = layer(x)
    wanted, load = loop_moe(layer, x)
    assert_close(y, wanted)
    assert_close(router["load"], load)
    assert experts < 16 or load.eq(0).any()
    parameters = x, layer.router.weight, layer.gate_up, layer.down
    got, wanted = (torch.autograd.grad(out, parameters, upstream) for out in (y, wanted))
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("s", [1, 4])
def test_every_position_is_routed_k_times_whatever_the_bag_size(s):
    """B*L*k, not times s."""
    _, router = gpt(**EXPERTS)(tokens(2, 12, s), tokens(2, 12, s))
    assert router["load"].sum(1).tolist() == [2 * 12 * 2] * 2


def test_router_statistics_by_loop():
    layer, x = moe(), torch.randn(2, 7, 32)
    _, router = layer(x)
    logits = [(layer.router.weight @ row).double() for row in x.flatten(0, 1)]
    probs = [z.softmax(0) for z in logits]
    chosen = [e for p in probs for e in p.topk(2).indices.tolist()]
    share = [chosen.count(e) / 14 for e in range(4)]
    wanted = {
        "balance_loss": 4 * sum(f * sum(p[e] for p in probs) / 14 for e, f in enumerate(share)),
        "z_loss": sum(z.exp().sum().log() ** 2 for z in logits) / 14,
        "entropy": -sum((p * p.log()).sum() for p in probs) / 14,
    }
    for key in wanted:
        assert_close(router[key].double(), wanted[key], rtol=1e-5, atol=0)
    assert {key for key in router if router[key].requires_grad} == {"balance_loss", "z_loss"}


def test_router_is_computed_in_float32_under_autocast():
    """Only what it reads is rounded. In bfloat16 it would send some positions to other experts."""
    layer, x = moe(n_expert=16), torch.randn(2, 50, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _, router = layer(x)
    logits = x.double() @ layer.router.weight.double().T
    load = logits.topk(2).indices.flatten().bincount(minlength=16)
    assert torch.equal(router["load"], load.float())
    assert_close(router["z_loss"].double(), logits.logsumexp(-1).square().mean(), rtol=1e-5, atol=0)


def test_balance_loss_by_shares_of_experts_that_are_given():
    """Those of earlier steps, say: only the mean probabilities are this batch's."""
    model, x, y = gpt(**EXPERTS), tokens(2, 12), tokens(2, 12, 1)
    shares, seen = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.5, 0.25, 0.25, 1.0]]), []
    for block in model.blocks:
        block.mlp.router.register_forward_hook(
            lambda *args: seen.append(args[2].softmax(-1).mean(0))
        )
    router = model(x, y, load_shares=shares)[1]
    assert_close(router["balance_loss"], 4 * (shares * torch.stack(seen)).sum(-1))
    model.config.checkpoint_activations = True
    assert_close(model(x, y, load_shares=shares)[1], router)
    own = model(x, y)[1]
    given = model(x, y, load_shares=own["load"] / 24)[1]
    assert_close(given["balance_loss"], own["balance_loss"])
    assert torch.equal(given["load"], own["load"])


def test_balancing_moves_biases_towards_an_even_load():
    model = gpt(balance_bias=True, **EXPERTS)
    model.balance_experts(torch.tensor([[9.0, 5.0, 5.0, 1.0], [5.0, 5.0, 5.0, 5.0]]), rate=0.01)
    assert_close(model.blocks[0].mlp.bias, torch.tensor([-0.01, 0.0, 0.0, 0.01]))
    assert not model.blocks[1].mlp.bias.any()


@dense_and_moe
def test_bfloat16_autocast_is_close_to_float32(kind):
    model, x, y = gpt(**kind), tokens(2, 12, 3), tokens(2, 12, 3)
    if kind:  # decided routers: rounding must not send a position to another expert
        with torch.no_grad():
            for block in model.blocks:
                block.mlp.router.weight *= 5
    wanted = gradients(model, x, y)
    loss = model(x, y)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, y)[0].item() == pytest.approx(loss, rel=0.01)
        got = gradients(model, x, y)
    for name in wanted:
        assert got[name].dtype == torch.float32
        assert (got[name] - wanted[name]).norm() <= 0.1 * wanted[name].norm(), name


# ---- generation


def test_temperature_zero_is_greedy():
    model, text = gpt(), tokens(2, 5)
    for new in model.generate(text, 10, temperature=0):
        # the context is cut to block_size
        assert torch.equal(new, model(text[:, -12:])[:, -1].argmax(-1))
        text = torch.cat((text, new[:, None]), 1)
    assert text.shape == (2, 15)


def test_top_k_restricts_and_temperature_follows_the_distribution():
    model, text = make_lively(gpt()), tokens(1, 5)
    logits = model(text)[0, -1]
    draws = next(model.generate(text.expand(4000, 5), 1, temperature=2.0, top_k=3))
    top = logits.topk(3)
    assert set(draws.tolist()) <= set(top.indices.tolist())
    frequency = torch.stack([(draws == i).float().mean() for i in top.indices])
    assert_close(frequency, (top.values / 2).softmax(0), rtol=0, atol=0.04)
