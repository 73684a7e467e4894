"""The GPT2LMHeadModel of Hugging Face transformers as a contestant."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.clock import Run
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, VOCAB
from device import DTYPES, autocast, native_dtypes


def train(device: str, rows: int, tokens: int) -> Run:
    """Set up a training step of the 124M model without dropout, on one batch of random tokens.

    On a CPU, the model computes in float32. On CUDA, it computes under autocast to the GPU's 16-bit precision, the
    matrix products that remain in float32 use TF32, and the optimizer is fused.
    """
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    model.to(device)
    where, dtype, fused = torch.device(device), torch.float32, device == "cuda"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        dtype = native_dtypes(where)[0]
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1, fused=fused)
    ids = torch.randint(VOCAB, (rows, tokens)).to(device)

    def step() -> None:
        with autocast(where, dtype):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decode(batch: int, dtype: str, device: str) -> Run:
    """Set up greedy decoding of `batch` random prompts with the 124M model in a precision such as "bfloat16"."""
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config()).eval()
    model.to(device, DTYPES[dtype])
    ids = torch.randint(VOCAB, (batch, PROMPT_TOKENS)).to(device)
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=mask, **options)
