"""Describe this machine and measure its limits: the rate of matrix products and the memory bandwidth of CPU or GPU."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

import device
from benchmarks.clock import seconds
from benchmarks.workload import BATCH, VOCAB
from kernels.cuda_loss import HEAD_MULTIPLE
from training.metrics import hardware


def describe(where: str) -> tuple[dict[str, Any], float]:
    """Return a description of the hardware, and the memory bandwidth of `where` (cpu or cuda) in bytes per second."""
    return hardware(), memory_bandwidth(where)


def native_dtypes(where: str) -> tuple[list[str], str]:
    """Return the precisions in which a device computes without emulation, and a name.

    The first precision is the one that this repository uses by default. The name is that of the GPU, or that of the
    CPU's instruction set.
    """
    native = device.native_dtypes(torch.device(where))
    name = torch.cuda.get_device_name() if where == "cuda" else device.cpu_instruction_set()
    return [str(dtype).removeprefix("torch.") for dtype in native], name


def matmul_rate(dtype_name: str, where: str) -> float:
    """Return the FLOP/s of the fastest matrix product in the linear layers and the output head of GPT-2 124M.

    The products of the forward and of the backward pass are timed one by one, with the batch of `bench.py train`.
    """
    dtype, best, (rows, tokens) = device.DTYPES[dtype_name], 0.0, BATCH[where]
    # The number of logits that the loss computes for a token. On a GPU, the loss pads the vocabulary.
    vocab = VOCAB if where == "cpu" else math.ceil(VOCAB / HEAD_MULTIPLE) * HEAD_MULTIPLE
    for n_in, n_out in [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768, vocab)]:
        x = torch.randn(rows * tokens, n_in, dtype=dtype, device=where)
        weight = torch.randn(n_out, n_in, dtype=dtype, device=where)
        y = x @ weight.T
        for left, right in [(x, weight.T), (y, weight), (y.T, x)] * 6:
            best = max(best, 2 * x.numel() * n_out / seconds(partial(torch.matmul, left, right)))
    return best


def memory_bandwidth(where: str) -> float:
    """Copy 512 MiB five times, and return the highest rate: bytes read plus bytes written, per second."""
    source, target = torch.ones(2**27, device=where), torch.zeros(2**27, device=where)
    return max(2 * source.nbytes / seconds(lambda: target.copy_(source)) for _ in range(5))


def read_bandwidth(where: str) -> float:
    """Read 512 MiB five times, and return the highest rate in bytes per second."""
    source = torch.ones(2**27, device=where)
    return max(source.nbytes / seconds(source.sum) for _ in range(5))
