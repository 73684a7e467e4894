"""Forward and backward pass on long sequences, with one of three kinds of attention: full, window or lsh."""

from __future__ import annotations

import torch

from benchmarks.clock import Run
from model import GPT, GPTConfig


def train(attention: str, tokens: int) -> Run:
    """Set up forward and backward pass of a model with one layer of two heads, over one sequence of random tokens.

    With "full" attention, a token attends to itself and to all earlier tokens. With "window", it attends to the last
    256 tokens, itself included. With "lsh" (locality-sensitive hashing), it attends to itself and, for each of 2 hash
    functions, to at most 128 earlier tokens whose keys have the same hash as its query.
    """
    torch.manual_seed(0)
    config = GPTConfig(
        256, tokens, n_layer=1, n_head=2, n_embd=128, attention=attention, window_size=256, lsh_buckets=tokens // 64
    )
    model, ids = GPT(config), torch.randint(256, (1, tokens))

    def run() -> None:
        loss = model(ids, targets=ids).loss
        assert loss is not None
        loss.backward()
        model.zero_grad()

    return run
