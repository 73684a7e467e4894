"""What this machine is and what it can do at most: matrix products and memory bandwidth."""

from __future__ import annotations

import time
from typing import Any

import torch

import device
from benchmarks.workload import ROWS, TOKENS, VOCAB
from training.metrics import hardware


def describe() -> tuple[dict[str, Any], float]:
    """Return a description of the hardware, and its memory bandwidth in bytes per second."""
    return hardware(), memory_bandwidth()


def native_dtypes() -> tuple[list[str], str]:
    """Return the precisions that this CPU computes in, its default first, and its instruction set."""
    native = device.native_dtypes(torch.device("cpu"))
    return [str(dtype).removeprefix("torch.") for dtype in native], device.cpu_instruction_set()


def matmul_rate(dtype_name: str) -> float:
    """Return the highest FLOP/s of the matrix products that a training step consists of, forward and backward."""
    dtype, best = device.DTYPES[dtype_name], 0.0
    for n_in, n_out in [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768, VOCAB)]:
        x, weight = torch.randn(ROWS * TOKENS, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype)
        y = x @ weight.T
        for left, right in [(x, weight.T), (y, weight), (y.T, x)] * 6:
            began = time.perf_counter()
            left @ right
            best = max(best, 2 * x.numel() * n_out / (time.perf_counter() - began))
    return best


def memory_bandwidth() -> float:
    """Return the bytes per second, read and written, of copying 512 MB with all threads."""
    source, target = torch.ones(2**27), torch.zeros(2**27)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - began))
    return best


def read_bandwidth() -> float:
    """Return the bytes per second of reading 512 MB with all threads."""
    source, best = torch.ones(2**27), 0.0
    for _ in range(5):
        began = time.perf_counter()
        source.sum()
        best = max(best, source.nbytes / (time.perf_counter() - began))
    return best
