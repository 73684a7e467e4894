"""build-nanogpt as a contestant. Its code is loaded from a clone of its repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiktoken
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.clock import Run
from benchmarks.peers.repository import load_file
from benchmarks.questions import hellaswag_rows
from data.tokenizer import load_tokenizer


def evaluate(directory: str, device: str) -> Run:
    """Set up the function evaluate() of build-nanogpt's hellaswag.py.

    It computes in float32, with matrix products in TF32 on a GPU. It would download a tokenizer, weights and questions,
    but here it gets a local tokenizer, random weights and local questions instead.
    """
    tokenizer: Any = load_tokenizer("gpt2")
    tiktoken.get_encoding = lambda encoding_name: tokenizer._tiktoken  # equal to what tiktoken would download
    hellaswag: Any = load_file(Path(directory) / "hellaswag.py")
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config()).eval()
    rows = [row | {"label": int(row["label"])} for row in hellaswag_rows()]
    hellaswag.iterate_examples = lambda split: iter(rows)
    hellaswag.GPT2LMHeadModel.from_pretrained = lambda name: model
    hellaswag.print = lambda *words: None
    return lambda: hellaswag.evaluate("gpt2", device)
