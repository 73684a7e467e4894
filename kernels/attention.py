"""The choice of PyTorch's attention kernel on CUDA, and a faster backward pass for 16-bit training on a CPU.

`CausalAttention` uses PyTorch's forward pass. In bfloat16 (AMD EPYC with avx512_bf16), PyTorch's own backward pass
takes 1.1 to 1.7 times as long as the one here and is slightly less accurate.
"""

from __future__ import annotations

import importlib.util
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

# The backends of scaled_dot_product_attention that need no preparation for a new shape. The fourth backend, cuDNN,
# builds a plan for each new shape, which takes up to half a second.
ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Newer forms of FlashAttention: major compute capability of the card -> (name in PyTorch, module that it needs).
NEWER_FLASH_ATTENTION = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}

# The backward pass of `CausalAttention` processes BLOCK_QUERIES queries of each head at a time. It processes several
# sequences together as long as these queries have at most BLOCK_WEIGHTS attention weights in total. More weights would
# not fit into the CPU's cache, and fewer would make the matrix products too small to be fast.
BLOCK_QUERIES, BLOCK_WEIGHTS = 128, 2**20


def attention_backends(device: torch.device, *, fixed_shapes: bool) -> AbstractContextManager:
    """Return a context that excludes cuDNN from PyTorch's attention kernels on CUDA, unless the shapes are fixed.

    In pretraining, all batches have one shape. cuDNN builds one plan for it and is then often the fastest kernel. In
    decoding, evaluation and classification, almost every batch has another shape, which would need a new plan.
    """
    if device.type != "cuda" or fixed_shapes:
        return nullcontext()
    return sdpa_kernel(ANY_SHAPE)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, *, training: bool
) -> Tensor:
    """Return `F.scaled_dot_product_attention` of q (B, H, T, D), k and v (B, H, S, D).

    cuDNN is excluded outside of training, and with a mask, which usually means padding: in both cases, the next batch
    probably has another shape.
    """
    with attention_backends(q.device, fixed_shapes=training and mask is None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


def use_newer_flash_attention(device: torch.device, dropout: float) -> str | None:
    """Let PyTorch use FlashAttention 3 or 4 if it is installed and made for this card. Return its name, "FA3" or "FA4".

    cuDNN's attention is then switched off, because PyTorch might prefer it. If neither version can be used, change
    nothing and return None. Neither version supports dropout of attention weights.
    """
    if device.type != "cuda" or dropout:
        return None
    name, module = NEWER_FLASH_ATTENTION.get(torch.cuda.get_device_capability(device)[0], ("", ""))
    try:
        if not name or importlib.util.find_spec(module) is None:
            return None
        activate_flash_attention_impl(name)
    # find_spec imports the parent package, which may fail. The installed kernels may not fit this version of PyTorch.
    except (ImportError, RuntimeError):
        return None
    torch.backends.cuda.enable_cudnn_sdp(False)
    return name


def plain_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √D) v over the keys up to each query's own position; all (B, H, T, D).

    This is the plain form that `CausalAttention` must equal. It keeps all (T, T) weights of each head in memory.
    """
    scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v


class CausalAttention(torch.autograd.Function):
    """Causal `F.scaled_dot_product_attention` of q, k and v (B, H, T, D) with a faster backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return causal_attention_gradients(dy, *ctx.saved_tensors)


# This is a custom operator, so that torch.compile treats it as a single operation instead of unrolling its loops.
@torch.library.custom_op("gpt2::causal_attention_gradients", mutates_args=())
def causal_attention_gradients(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to q, k and v, given the gradient `dy` of the output; all (B, H, T, D).

    The attention weights are not saved by the forward pass. They are computed again here, one block of queries at a
    time, as in FlashAttention (Dao et al. 2022, algorithm 4). Scores and softmax are computed in float32, the other
    four matrix products in the dtype of q.
    """
    _, H, T, _ = q.shape
    sequences = max(1, BLOCK_WEIGHTS // (H * BLOCK_QUERIES * T))
    dq, dk, dv = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    for parts in zip(*(t.split(sequences) for t in (dy, q, k, v, dq, dk, dv)), strict=True):
        inputs, gradients = parts[:4], parts[4:]
        # Contiguous copies save more time than they cost: q, k and v are slices of one tensor (B, T, 3 C), and matrix
        # products are slower when consecutive rows are far apart in memory.
        _write_gradients(*(t.flatten(0, 1).contiguous() for t in inputs), *(t.flatten(0, 1) for t in gradients))
    return dq, dk, dv


def _write_gradients(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Compute the gradients of some heads, and write them to dq, dk and dv. All tensors are (heads, T, D)."""
    T, scale = q.size(1), 1 / math.sqrt(q.size(2))
    queries, keys = q.float() * scale, k.float().mT
    # Every block of queries adds to the gradients of the keys and values before it. These long sums need float32.
    dk_sum, dv_sum = torch.zeros_like(queries), torch.zeros_like(queries)
    future = torch.full((BLOCK_QUERIES, BLOCK_QUERIES), float("-inf")).triu(1)
    for first in range(0, T, BLOCK_QUERIES):
        last = min(first + BLOCK_QUERIES, T)
        # Keys after the block have weight 0, so they are left out.
        block, seen = slice(first, last), slice(last)
        scores = queries[:, block] @ keys[:, :, seen]  # (heads, block, seen)
        scores[:, :, first:] += future[: last - first, : last - first]
        weights = torch.softmax(scores, dim=-1, out=scores).to(q.dtype)
        dweights = dy[:, block] @ v[:, seen].mT
        dscores = torch._softmax_backward_data(dweights, weights, -1, q.dtype)
        dq[:, block] = (dscores @ k[:, seen]).mul_(scale)
        dk_sum[:, seen] += dscores.mT @ q[:, block]
        dv_sum[:, seen] += weights.mT @ dy[:, block]
    dk.copy_(dk_sum.mul_(scale))
    dv.copy_(dv_sum)


@causal_attention_gradients.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
