"""nanoGPT as a contestant. Its code is loaded from a clone of its repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Run
from benchmarks.peers.repository import load_file
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, VOCAB
from device import autocast, native_dtypes


def train(directory: str, device: str, rows: int, tokens: int) -> Run:
    """Set up nanoGPT's training step of the 124M model with its own optimizer and padded vocabulary.

    On a CPU, the model computes in float32 and is not compiled, as nanoGPT's README recommends. On CUDA, the model is
    compiled and computes under autocast to the GPU's 16-bit precision and with TF32, as in nanoGPT's train.py.
    """
    nanogpt = load_file(Path(directory) / "model.py")
    torch.manual_seed(0)
    model: Any = nanogpt.GPT(nanogpt.GPTConfig(bias=False)).to(device).train()
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    ids = torch.randint(VOCAB, (rows, tokens + 1)).to(device)
    where, dtype = torch.device(device), torch.float32
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        model, dtype = torch.compile(model), native_dtypes(where)[0]

    def step() -> None:
        with autocast(where, dtype):
            loss = model(ids[:, :-1], ids[:, 1:].contiguous())[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decode(directory: str, device: str) -> Run:
    """Set up decoding of one sample in float32, without a KV cache, with the sampling options of sample.py.

    The precision is float32 because bench.py compares this contestant only with others that decode in float32.
    """
    nanogpt = load_file(Path(directory) / "model.py")
    torch.manual_seed(0)
    model = nanogpt.GPT(nanogpt.GPTConfig()).to(device).eval()
    ids = torch.randint(VOCAB, (1, PROMPT_TOKENS)).to(device)
    return lambda: model.generate(ids, NEW_TOKENS, temperature=0.8, top_k=200)
