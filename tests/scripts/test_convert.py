"""Test that models of nanoGPT and llm.c are converted with all their numbers, and that other files are refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig
from pretrained import load_model
from scripts.convert import main, read_llm_c, read_nanogpt

SHAPE = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 8}


def transformers_twin(vocab_size, activation):
    """Return a transformers GPT-2 with large random weights, as a reference of the logits."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=16,
        n_layer=2,
        n_head=2,
        n_embd=8,
        activation_function=activation,
        initializer_range=0.5,
    )
    return GPT2LMHeadModel(config).eval()


def linear_state(theirs):
    """Return the parameters as nanoGPT and llm.c name and store them: matrices as those of nn.Linear."""
    conv1d = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
    state = {name: tensor.detach().clone() for name, tensor in theirs.named_parameters()}
    return {name: tensor.T.contiguous() if conv1d.search(name) else tensor for name, tensor in state.items()}


def write_nanogpt(path, theirs, *, bias=True, prefix="", **changes):
    state = linear_state(theirs)
    if not bias:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".bias")}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "model_args": {**SHAPE, "vocab_size": theirs.config.vocab_size, "bias": bias, "dropout": 0.2},
        "iter_num": 10,
        "best_val_loss": torch.tensor(3.0),
        "config": {"out_dir": "out", "compile": True},
    }
    torch.save(checkpoint | changes, path)
    return path


def write_llm_c(path, theirs, dtype, version, padded=50304):
    """Write the format of llm.c's write_model: a header, then each parameter, those of the blocks block by block."""
    state = linear_state(theirs)
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, version, 16, 50257, 2, 2, 8, padded
    state["transformer.wte.weight"] = torch.cat((state["transformer.wte.weight"], torch.zeros(padded - 50257, 8)))
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            names += [f"transformer.h.{layer}.{part}.{kind}" for layer in range(2)]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for name in names:
            tensor = state[name].to(dtype)
            file.write((tensor.view(torch.int16) if dtype == torch.bfloat16 else tensor).numpy().tobytes())
    return path


def assert_same_logits(ours, theirs):
    ids = torch.randint(min(ours.config.vocab_size, theirs.config.vocab_size), (2, 9))
    expected = theirs(ids).logits[..., : ours.config.vocab_size]
    torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("activation", "flags"), [("gelu", []), ("gelu_new", ["--activation", "gelu_new"])])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt_gives_the_same_logits(tmp_path, activation, flags, prefix):
    theirs = transformers_twin(50304, activation)
    main([str(write_nanogpt(tmp_path / "ckpt.pt", theirs, prefix=prefix)), "--out", str(tmp_path / "new"), *flags])
    model, tokenizer, _ = load_model(str(tmp_path / "new"))
    assert model.config.vocab_size == tokenizer.vocab_size == 50257
    assert model.config.dropout == 0.2
    assert_same_logits(model, theirs)
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "new").eval()
    assert_same_logits(model, again)


def test_nanogpt_without_biases_has_biases_of_0(tmp_path):
    theirs = transformers_twin(70, "gelu")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    assert_same_logits(read_nanogpt(write_nanogpt(tmp_path / "ckpt.pt", theirs, bias=False), "gelu"), theirs)


def test_a_vocabulary_of_another_size_is_converted_without_a_tokenizer(tmp_path, capsys):
    theirs = transformers_twin(65, "gelu")
    main([str(write_nanogpt(tmp_path / "ckpt.pt", theirs)), "--out", str(tmp_path / "new")])
    assert "has 65 tokens, and GPT-2's tokenizer 50257" in capsys.readouterr().err
    assert_same_logits(GPT.from_pretrained(tmp_path / "new"), theirs)
    assert not list((tmp_path / "new").glob("tokenizer*"))


@pytest.mark.parametrize(("dtype", "version"), [(torch.float32, 3), (torch.bfloat16, 5)], ids=["float32", "bfloat16"])
def test_a_model_of_llm_c_gives_the_same_logits(tmp_path, dtype, version):
    theirs = transformers_twin(50257, "gelu_new")
    main([str(write_llm_c(tmp_path / "model.bin", theirs, dtype, version)), "--out", str(tmp_path / "new")])
    assert GPT.from_pretrained(tmp_path / "new").transformer.wte.weight.dtype == dtype
    model, tokenizer, _ = load_model(str(tmp_path / "new"))
    assert model.config == GPTConfig(**SHAPE, activation="gelu_new")
    assert tokenizer.kind == "gpt2"
    assert_same_logits(model, theirs.to(dtype).float())


def test_a_file_that_executes_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = write_nanogpt(tmp_path / "ckpt.pt", transformers_twin(65, "gelu"), config=Trap())
    with pytest.raises(ValueError, match=r"ckpt\.pt cannot be read as plain tensors"):
        read_nanogpt(path, "gelu")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": None}, "is not a checkpoint of nanoGPT: expected a dictionary with model and model_args"),
        ({"model_args": {"n_layer": 2}}, "model_args lacks 'vocab_size'"),
        ({"model_args": SHAPE | {"vocab_size": 65, "n_head": 3}}, r"model_args: n_embd \(8\) must be divisible"),
        ({"model_args": SHAPE | {"vocab_size": 64}}, "do not match its configuration"),
        ({"model_args": SHAPE | {"vocab_size": 65, "n_layer": 10**9}}, "n_layer 1000000000, but .* of 2 blocks"),
        ({"model": {"transformer.wte.weight": 3}}, "holds a int under the key 'transformer.wte.weight'"),
        ({"model": {5: torch.zeros(2)}}, "holds a Tensor under the key 5"),
    ],
    ids=str,
)
def test_another_dictionary_is_refused(tmp_path, capsys, changes, message):
    path = write_nanogpt(tmp_path / "ckpt.pt", transformers_twin(65, "gelu"), **changes)
    with pytest.raises(SystemExit):
        main([str(path), "--out", str(tmp_path / "new")])
    assert re.search(rf"ckpt\.pt.*{message}", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_damaged_files_of_llm_c_are_refused(tmp_path):
    path = write_llm_c(tmp_path / "model.bin", transformers_twin(50257, "gelu_new"), torch.bfloat16, 5)
    content = path.read_bytes()
    for damaged, message in [
        (content[:-2], r"model\.bin has .* bytes, expected"),
        (content[:4] + b"\1" + content[5:], "expected 20240326 and version 3"),
        (content[:100], "is not a model that llm.c writes"),
        (content[:20] + b"\3" + content[21:], r"n_embd \(8\) must be divisible by n_head \(3\)"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_llm_c(path)


def test_a_directory_with_files_is_not_overwritten(tmp_path, capsys):
    path = write_nanogpt(tmp_path / "ckpt.pt", transformers_twin(65, "gelu"))
    with pytest.raises(SystemExit):
        main([str(path), "--out", str(tmp_path)])
    assert "is not empty: choose another directory" in capsys.readouterr().err
