"""Models that nanoGPT's and llm.c's own code writes give the same logits after `scripts.convert`.

The environment variables NANOGPT and LLM_C name the sources: directories with model.py, and with train_gpt2.py.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from pretrained import load_model
from scripts.convert import main

pytestmark = pytest.mark.slow
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}


def load_source(variable, file):
    """Return the module in a file of the directory that an environment variable names, or skip the test."""
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a directory with {file}")
    spec = importlib.util.spec_from_file_location(variable.lower(), Path(os.environ[variable]) / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_large_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def convert(path):
    main([str(path), "--out", str(path.parent / "converted")])
    return load_model(str(path.parent / "converted"))[0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt(tmp_path, largest_difference, bias):
    nanogpt = load_source("NANOGPT", "model.py")
    arguments = SHAPE | {"bias": bias, "vocab_size": 50304, "dropout": 0.0}
    torch.manual_seed(0)
    theirs = with_large_weights(nanogpt.GPT(nanogpt.GPTConfig(**arguments)))
    optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    checkpoint = {"model": theirs.state_dict(), "optimizer": optimizer.state_dict(), "model_args": arguments}
    torch.save(checkpoint | {"iter_num": 1, "best_val_loss": torch.tensor(1.0)}, tmp_path / "ckpt.pt")
    ids = torch.randint(50257, (2, 16))
    expected = theirs(ids, ids)[0][..., :50257].detach()
    largest_difference(convert(tmp_path / "ckpt.pt")(ids).logits.detach(), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_llm_c(tmp_path, largest_difference, dtype):
    llm_c = load_source("LLM_C", "train_gpt2.py")
    torch.manual_seed(0)
    theirs = with_large_weights(llm_c.GPT(llm_c.GPTConfig(**SHAPE)))
    llm_c.write_model(theirs, tmp_path / "model.bin", dtype)
    ids = torch.randint(50257, (2, 16))
    expected = theirs.to(getattr(torch, dtype)).float()(ids, ids)[0].detach()
    largest_difference(convert(tmp_path / "model.bin")(ids).logits.detach(), expected)
