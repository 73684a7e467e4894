"""The keys that each query attends to, and the position of each token, with padding and with cached tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def find_positions(attention_mask: Tensor | None, past: int, T: int, device: torch.device) -> Tensor:
    """Return the position of each of T tokens that follow `past` cached ones, (T,) or, with a mask, (B, T).

    With attention_mask (B, past + T), 1 for a token to keep and 0 for padding, the kept tokens of a row are counted, so
    that a left-padded text gets the positions that it has alone.
    """
    if attention_mask is None:
        return torch.arange(past, past + T, device=device)
    # Kept tokens count 0, 1, 2, ... Padding before the first one would get -1, which is no position.
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]


def make_mask(attention_mask: Tensor | None, past: int, T: int, device: torch.device, *, causal: bool) -> Tensor | None:
    """Return booleans (B or 1, 1, T, past + T), True where a query may attend.

    The result is None if no padding is masked and PyTorch's `is_causal` says the same, see `model.Attention`.
    """
    # With cached keys, query i has position past + i, but `is_causal` of PyTorch's kernel assumes position i.
    if attention_mask is None and not (causal and past > 0 and T > 1):
        return None
    everything = torch.ones(1, 1, T, past + T, dtype=torch.bool, device=device)
    mask = everything.tril(past) if causal else everything
    if attention_mask is not None:
        # Keep the diagonal, so that padding attends at least to itself. A softmax over no key at all is NaN. In the
        # next layer that NaN is a value with weight 0, and 0 times NaN is NaN: it would spread to all tokens.
        itself = everything.tril(past).triu(past)
        mask = mask & attention_mask.bool()[:, None, None, :] | itself
    return mask
