"""examples/hf_tst.py: TST of a transformers model gives the losses of train.py from the same weights and text."""
import importlib.util
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch

from safetensors.torch import load_file

import export
from conftest import ROOT, write_corpus
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

spec = importlib.util.spec_from_file_location("hf_tst", ROOT / "examples" / "hf_tst.py")
hf_tst = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf_tst)

SHAPES = {
    "llama": dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ff_dim=64),
    # one layer: transformers pools the balance loss over the layers, train.py averages it, and only so they agree
    "qwen3_moe": dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, ff_dim=32, qk_norm=True, n_expert=4, top_k=2),
}


@pytest.fixture
def text(tmp_path):
    """Path of a text file. The folder beside it, "data", holds the same as a corpus of train.py."""
    path, text = tmp_path / "text.txt", (ROOT / "tst.py").read_text(encoding="utf-8")[:3000]
    path.write_text(text, encoding="utf-8")
    tokens = get_tokenizer("bytes").encode(text)
    write_corpus(tmp_path / "data", tokens, tokens, 256)
    return path


def write_tokenizer(folder):
    export.write_json(folder, "tokenizer.json", export.hf_tokenizer(get_tokenizer("bytes")))
    export.write_json(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


@pytest.mark.parametrize("name", SHAPES)
def test_losses_equal_train_py(name, text, tmp_path, run):
    folder = str(tmp_path / "start")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, block_size=16, **SHAPES[name]))
    export.save_hf(model.state_dict(), model.config, folder, separator=0, balance_coef=0.05)
    write_tokenizer(folder)

    # 5 of 20 steps in superposition; after them the second epoch begins
    rows = run(**SHAPES[name], dataset=str(tmp_path / "data"), init_from=f"hf:{folder}", bag_size=4, superposition_ratio=0.25,
               block_size=16, batch_size=8, total_batch=128, max_steps=20, learning_rate=5e-3, warmup_steps=4,
               balance_coef=0.05)
    expected = [row["loss"] for row in rows]
    losses = hf_tst.main([
        f"--model={folder}", f"--text={text}", f"--out={tmp_path / 'end'}", "--bag_size=4", "--superposition_ratio=0.25",
        "--steps=20", "--batch_size=8", "--block_size=16", "--lr=5e-3", "--warmup=4"])
    print(f"{name}: losses differ by at most {max(abs(a - b) for a, b in zip(losses, expected)):.1e}")
    assert losses == pytest.approx(expected, abs=1e-4) and len(losses) == 20
    assert losses[-1] < losses[5] - 0.3  # it has learned something

    export.main([str(tmp_path / "run" / "last.pt"), str(tmp_path / "end_of_train")])  # both ended with the same model
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("end_of_train", "end"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_from_scratch(name, text, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    export.write_json(folder, "config.json", export.hf_config(GPTConfig(vocab_size=256, block_size=16, **SHAPES[name])))
    write_tokenizer(folder)
    arguments = [f"--model={folder}", f"--text={text}", "--from_scratch", "--steps=4", "--batch_size=4",
                 "--block_size=16"]
    first = hf_tst.main(arguments)
    assert first == hf_tst.main(arguments)  # the seed decides
    assert first[0] == pytest.approx(5.545, abs=0.1)  # log 256
