"""Compute the loss and bits per byte on the validation split of a dataset, in the same way as training does."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORE_INDEX, Windows, ceil_div, validation_batches
from model import GPT


class SplitLoss(NamedTuple):
    """The mean loss over `tokens` targets, in nats per token and in bits per byte."""

    loss: float  # nats per token
    bits_per_byte: float  # bits per byte of UTF-8 text; comparable between tokenizers
    tokens: int


def joined(losses: Collection[SplitLoss]) -> SplitLoss:
    """Return the loss and bits per byte of several splits together, as if they were one split."""
    if len(losses) == 1:
        return next(iter(losses))
    tokens = sum(part.tokens for part in losses)
    nats = sum(part.loss * part.tokens for part in losses)
    n_bytes = sum(part.loss * part.tokens / math.log(2) / part.bits_per_byte for part in losses if part.bits_per_byte)
    return SplitLoss(nats / tokens, nats / math.log(2) / max(n_bytes, 1), tokens)


class ArrayWindows:
    """Tokens in memory, cut into windows of T inputs like those of `data.loader.TokenWindows`.

    Window w has the tokens [w*T, w*T + T + 1). Every token except the first is a target once. The last window may have
    fewer than T targets.

    Raises ValueError if there are fewer than two tokens.
    """

    document_mask = False

    def __init__(self, tokens: np.ndarray, sequence_length: int, source: str) -> None:
        if len(tokens) < 2:
            raise ValueError(f"{source} has {len(tokens)} tokens, expected at least 2: an input and its target")
        self.tokens, self.sequence_length, self.source = tokens, sequence_length, source
        self.n_targets = len(tokens) - 1
        self.fingerprint = hashlib.sha256(tokens.tobytes()).hexdigest()

    def __len__(self) -> int:
        return ceil_div(self.n_targets, self.sequence_length)

    def read(self, window: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Copy a window to `inputs` and `targets`, each (T,) int64. A short window is padded with 0 and IGNORE_INDEX.

        `documents` is ignored, because these windows have no document mask.
        """
        start = window * self.sequence_length
        tokens = self.tokens[start : start + self.sequence_length + 1]
        n = len(tokens) - 1
        inputs[:n], inputs[n:] = tokens[:-1], 0
        targets[:n], targets[n:] = tokens[1:], IGNORE_INDEX

    def count(self, windows: np.ndarray) -> int:
        """Return the total number of targets, without padding, in the windows with the indices `windows` (k,)."""
        return int(np.minimum(self.sequence_length, self.n_targets - windows * self.sequence_length).sum())


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
    """Compute the mean loss over every target of the windows that is not IGNORE_INDEX.

    All ranks return the same result. The number of ranks changes the result only by rounding errors. The caller must
    set the model to eval mode.

    Args:
        token_bytes: (vocab_size,) the number of UTF-8 bytes of each token. It is 0 for end-of-text, whose loss is still
            included.
        micro_batch: windows per forward pass.
        rank, world_size: each of `world_size` ranks computes a contiguous part of the windows.
        reduce: returns the sum of a tensor over all ranks.
        autocast: returns the context manager in which the forward passes run.
    """
    device = model.transformer.wte.weight.device
    bytes_of = torch.from_numpy(token_bytes)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    loss = torch.zeros((), dtype=dtype, device=device)
    counted = torch.zeros(2, dtype=torch.float64)  # tokens, bytes
    for inputs, targets, weight, documents in validation_batches(
        windows, micro_batch=micro_batch, rank=rank, world_size=world_size
    ):
        ids = None if documents is None else documents.to(device)
        with autocast():
            mean = model(inputs.to(device), targets=targets.to(device), document_ids=ids).loss
        loss += mean.to(dtype) * weight
        scored = targets[targets != IGNORE_INDEX]
        counted += torch.tensor([len(scored), int(bytes_of[scored].sum())])
    nats, n_tokens, n_bytes = reduce(torch.cat([loss[None], counted.to(device, dtype)])).tolist()
    bits = nats * n_tokens / math.log(2)
    return SplitLoss(nats, bits / max(n_bytes, 1), int(n_tokens))
