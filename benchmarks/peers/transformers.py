"""Hugging Face transformers: its GPT2LMHeadModel."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.clock import Run
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, ROWS, TOKENS, VOCAB
from device import DTYPES


def train() -> Run:
    """Set up a training step of the 124M model in float32 without dropout, on one batch of random tokens."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(VOCAB, (ROWS, TOKENS))

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decode(batch: int, dtype: str) -> Run:
    """Set up greedy decoding of `batch` random prompts with the 124M model in a precision such as "bfloat16"."""
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config()).eval()
    model.to(DTYPES[dtype])
    ids = torch.randint(VOCAB, (batch, PROMPT_TOKENS))
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=mask, **options)
