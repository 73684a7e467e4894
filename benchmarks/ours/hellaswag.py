"""The evaluation of HellaSwag, with the functions that eval.run uses."""

from __future__ import annotations

import torch

from benchmarks.clock import Run
from benchmarks.questions import hellaswag_rows
from data.tokenizer import load_tokenizer
from device import DTYPES, autocast, keep_freed_memory
from eval.choices import answer
from eval.hellaswag import completion
from eval.likelihood import log_likelihoods
from model import GPT, GPTConfig


def evaluate(dtype: str, device: str) -> Run:
    """Set up the evaluation of the 124M model under autocast to `dtype`.

    Each of a question's endings follows the unchanged context. eval/hellaswag.py calls this convention "completion".
    """
    keep_freed_memory()
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2")).to(device).eval()
    tokenizer = load_tokenizer("gpt2")
    questions = [completion(row) for row in hellaswag_rows()]

    def run() -> None:
        with autocast(torch.device(device), DTYPES[dtype]):
            answer(questions, tokenizer, lambda requests: log_likelihoods(model, requests), "completion")

    return run
