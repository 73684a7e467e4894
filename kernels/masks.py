"""Find the keys that each query attends to, and the position of each token: with padding, cache and documents."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.document_attention import DocumentMask
from kernels.long_attention import LSH, Window

# A mask says which keys each query may attend to. It is a tensor of booleans (B or 1, 1, T or 1, S), True where a query
# may attend to a key, or a DocumentMask, which has the document of each token.
Mask = Tensor | DocumentMask


def find_positions(
    attention_mask: Tensor | None, document_ids: Tensor | None, past: int, T: int, device: torch.device
) -> Tensor:
    """Return the positions of T tokens that follow `past` cached ones: (T,), or (B, T) with a mask or documents.

    Args:
        attention_mask: (B, past + T), 1 for a token to keep and 0 for padding. The kept tokens of a row are counted, so
            that a left-padded text gets the same positions as without padding.
        document_ids: (B, T), equal for the tokens of a document. Positions begin at 0 in each document.
    """
    if document_ids is not None:
        return DocumentMask(document_ids).positions()
    if attention_mask is None:
        return torch.arange(past, past + T, device=device)
    # The kept tokens get 0, 1, 2, ... Padding before the first kept token would get -1, which is not a position.
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]


def make_mask(
    attention_mask: Tensor | None, document_ids: Tensor | None, past: int, T: int, device: torch.device, *, causal: bool
) -> Mask | None:
    """Return which keys each query may attend to. With `causal`, no query attends to a later key.

    The other arguments are those of `find_positions`. With document_ids, the mask is causal, and no other argument is
    used: `checks.check_masks` refuses documents together with padding, cached tokens or a model that is not causal.

    The result is None if there is no attention_mask, and either every query may attend to every key, or the argument
    `is_causal` of PyTorch's kernel is enough.
    """
    if document_ids is not None:
        return DocumentMask.of(document_ids)
    # With cached keys, query i has position past + i, but `is_causal` of PyTorch's kernel assumes position i. So a mask
    # is needed, except for a single query, which may attend to every key.
    if attention_mask is None and not (causal and past > 0 and T > 1):
        return None
    everything = torch.ones(1, 1, T, past + T, dtype=torch.bool, device=device)
    mask = everything.tril(past) if causal else everything
    if attention_mask is not None:
        # Keep the diagonal, so that padding attends at least to itself. A softmax over no key is NaN, and later layers
        # would spread the NaN to all tokens, because 0 times NaN is NaN.
        itself = everything.tril(past).triu(past)
        mask = mask & attention_mask.bool()[:, None, None, :] | itself
    return mask


def dense_mask(q: Tensor, k: Tensor, mask: Mask | None, is_causal: bool, pattern: Window | LSH | None) -> Tensor | None:
    """Return booleans that broadcast to (B, H, T, S), True where a query of q (B, H, T, D) may attend to a key of k.

    The result combines the causal mask or `mask` with `pattern`. None means that every query may attend to every key.

    Args:
        k: (B, H, S, D).
        mask: see `Mask`; None masks nothing.
        is_causal: whether each query attends only to the keys up to its own position; needs `mask` None and T = S.
        pattern: the Window or LSH that selects the keys that a query attends to; None means all.
    """
    if is_causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    if isinstance(mask, DocumentMask):
        mask = mask.dense()
    return mask if pattern is None else pattern.mask(q, k, mask)
