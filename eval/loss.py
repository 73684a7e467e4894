"""Loss and bits per byte of a dataset's split: what training validates by, and what two models are compared in."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORE_INDEX, Windows, validation_batches
from model import GPT


class SplitLoss(NamedTuple):
    """The mean over `tokens` targets."""

    loss: float  # nats a token
    bits_per_byte: float  # bits a byte of UTF-8 text: comparable between tokenizers
    tokens: int


@torch.no_grad()
def split_loss(
    model: GPT,
    windows: Windows,
    token_bytes: np.ndarray,
    *,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> SplitLoss:
    """Score every target of the windows of a split that counts, `micro_batch` windows at a time.

    `token_bytes` (vocab_size,) is the UTF-8 bytes of each id, 0 for end-of-text, whose loss counts all the same. Each
    of `world_size` ranks takes a share, and `reduce` sums a tensor over them: the result is the same on all and for any
    number of them. The model's mode is left as it is: put it in eval mode first.
    """
    device = model.transformer.wte.weight.device
    bytes_of = torch.from_numpy(token_bytes)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # which mps lacks
    loss = torch.zeros((), dtype=dtype, device=device)
    counted = torch.zeros(2, dtype=torch.float64)  # tokens, bytes
    for inputs, targets, share in validation_batches(
        windows, micro_batch=micro_batch, rank=rank, world_size=world_size
    ):
        with autocast():
            mean = model(inputs.to(device), targets=targets.to(device)).loss
        loss += mean.to(dtype) * share
        scored = targets[targets != IGNORE_INDEX]
        counted += torch.tensor([len(scored), int(bytes_of[scored].sum())])
    nats, n_tokens, n_bytes = reduce(torch.cat([loss[None], counted.to(device, dtype)])).tolist()
    bits = nats * n_tokens / math.log(2)
    return SplitLoss(nats, bits / max(n_bytes, 1), int(n_tokens))
