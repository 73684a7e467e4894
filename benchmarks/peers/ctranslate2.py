"""CTranslate2, an inference engine in C++, as a contestant."""

from __future__ import annotations

import tempfile
from pathlib import Path

import ctranslate2
import torch

from benchmarks.clock import Run
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig


def decode(batch: int, dtype: str) -> Run:
    """Set up greedy decoding of `batch` prompts with a saved 124M model, converted by CTranslate2's own converter."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        GPT(GPTConfig.preset("gpt2")).save_pretrained(temporary)
        load_tokenizer("gpt2").save(temporary)
        converted = str(Path(temporary) / "converted")
        ctranslate2.converters.TransformersConverter(temporary).convert(converted, quantization=dtype)
        generator = ctranslate2.Generator(converted, compute_type=dtype, intra_threads=torch.get_num_threads())
    prompts = [["<|endoftext|>"] * PROMPT_TOKENS] * batch
    length = PROMPT_TOKENS + NEW_TOKENS
    return lambda: generator.generate_batch(prompts, max_length=length, min_length=length, sampling_topk=1)
