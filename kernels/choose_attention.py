"""Choose between the fast forms of attention: by the device, and by the requested mask, pattern and dropout."""

from __future__ import annotations

from torch import Tensor

from kernels.attention import CausalAttention, fused_attention
from kernels.document_attention import DocumentMask
from kernels.long_attention import LSH, Window
from kernels.masks import Mask


def fast_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    dropout: float,
    is_causal: bool,
    pattern: Window | LSH | None,
    *,
    training: bool,
) -> Tensor:
    """Return the attention (B, H, T, D) of q (B, H, T, D), k and v (B, H, S, D) in the fastest form for this case.

    Args:
        mask: see `kernels.masks.Mask`; None masks nothing.
        is_causal: whether each query attends only to the keys up to its own position; True only if `mask` is None.
        pattern: the Window or LSH that selects the keys that a query attends to; None: it selects all.
        training: whether the model is in training mode. If it is, all batches without a mask should have the same
            shape: on CUDA, each new shape is slow.
    """
    if isinstance(mask, DocumentMask):
        return mask.attend(q, k, v, dropout)
    if pattern is not None:
        return pattern(q, k, v, mask, dropout)
    if is_causal and not dropout and q.device.type == "cpu" and q.dtype.itemsize < 4 and q.requires_grad:
        return CausalAttention.apply(q, k, v)  # the same result with a faster backward pass in 16 bits
    return fused_attention(q, k, v, mask, dropout, is_causal, training=training)
