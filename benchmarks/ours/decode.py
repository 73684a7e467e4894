"""Greedy decoding with the repository's own generate()."""

from __future__ import annotations

import torch

from benchmarks.clock import Run
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, VOCAB
from device import DTYPES
from generation import generate, pack_weights
from model import GPT, GPTConfig


def decode(batch: int, dtype: str, device: str) -> Run:
    """Set up greedy decoding of `batch` random prompts with the 124M model in a precision such as "bfloat16"."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2")).to(device, DTYPES[dtype]).eval()
    pack_weights(model, batch)
    ids = torch.randint(VOCAB, (batch, PROMPT_TOKENS)).to(device)
    return lambda: generate(model, ids, max_new_tokens=NEW_TOKENS)
