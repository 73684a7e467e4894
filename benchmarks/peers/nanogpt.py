"""nanoGPT, read from a clone of its repository."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.clock import Run
from benchmarks.peers.repository import load_file
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, ROWS, TOKENS, VOCAB


def train(directory: str) -> Run:
    """Set up nanoGPT's training step of the 124M model as its README recommends for a CPU.

    It computes in float32 with nanoGPT's own optimizer and padded vocabulary, and is not compiled.
    """
    nanogpt = load_file(Path(directory) / "model.py")
    torch.manual_seed(0)
    model = nanogpt.GPT(nanogpt.GPTConfig(bias=False)).train()
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    ids = torch.randint(VOCAB, (ROWS, TOKENS + 1))

    def step() -> None:
        model(ids[:, :-1], ids[:, 1:].contiguous())[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decode(directory: str) -> Run:
    """Set up decoding as in nanoGPT's sample.py: one sample at a time, without a cache, in float32, with top-k 200."""
    nanogpt = load_file(Path(directory) / "model.py")
    torch.manual_seed(0)
    model = nanogpt.GPT(nanogpt.GPTConfig()).eval()
    ids = torch.randint(VOCAB, (1, PROMPT_TOKENS))
    return lambda: model.generate(ids, NEW_TOKENS, temperature=0.8, top_k=200)
