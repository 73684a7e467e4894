"""Loss and bits per byte of a dataset's split: what training validates by, and what two models are compared in."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORE_INDEX, validation_batches
from data.shards import Split
from model import GPT


class SplitLoss(NamedTuple):
    """The mean over `tokens` targets."""

    loss: float  # nats a token
    bits_per_byte: float  # bits a byte of UTF-8 text: comparable between tokenizers
    tokens: int


@torch.no_grad()
def split_loss(
    model: GPT,
    split: Split,
    token_bytes: np.ndarray,
    *,
    tokens: int,
    sequence_length: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> SplitLoss:
    """Score the first `tokens` targets of a split, or all it has, in windows of `sequence_length` from its beginning.

    `token_bytes` (vocab_size,) is the UTF-8 bytes of each id, 0 for end-of-text, whose loss counts all the same. Each
    of `world_size` ranks takes a share, and `reduce` sums a tensor over them: the result is the same on all and for any
    number of them. The model's mode is left as it is: put it in eval mode first.
    """
    device = model.transformer.wte.weight.device
    bytes_of = torch.from_numpy(token_bytes)
    total = torch.zeros((), dtype=torch.float64, device=device)
    counted = torch.zeros(2, dtype=torch.float64)  # tokens, bytes
    for batch in validation_batches(
        split,
        tokens=tokens,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        vocab_size=len(token_bytes),
        rank=rank,
        world_size=world_size,
    ):
        with autocast():
            loss = model(batch.inputs.to(device), targets=batch.targets.to(device)).loss
        total += loss * batch.tokens
        counted += torch.tensor([batch.tokens, int(bytes_of[batch.targets[batch.targets != IGNORE_INDEX]].sum())])
    nats, n_tokens, n_bytes = reduce(torch.cat([total[None], counted.to(device)])).tolist()
    return SplitLoss(nats / n_tokens, nats / math.log(2) / max(n_bytes, 1), int(n_tokens))
