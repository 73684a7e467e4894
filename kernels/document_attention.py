"""Causal attention inside documents: if a sequence has several texts, each token attends to its own text only.

On a CPU, PyTorch's kernel is called for each document, so a sequence of short documents takes less time than one long
text. On CUDA, FlexAttention (Dong et al. 2024) skips, for each block of queries, the blocks of keys to which none of
these queries may attend. With dropout, or on another device, PyTorch's kernel gets the plain mask (T, T).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention import causal_attention_gradients

# In 16-bit precision, the backward pass uses `causal_attention_gradients` only for documents of more than this number
# of tokens. For shorter documents, PyTorch's kernel runs in float32: small matrix products are not faster in bfloat16.
SHORT = 256


class DocumentMask(NamedTuple):
    """Which keys a query may attend to, given which document each token belongs to.

    ids: (B, T) integers; the tokens of a document have the same id and are next to each other;
    block_mask: the same mask in FlexAttention's form; None if the device is not CUDA.
    """

    ids: Tensor
    block_mask: Any = None

    @classmethod
    def of(cls, ids: Tensor) -> DocumentMask:
        """Return the mask of a batch for document ids (B, T). A model makes it once and uses it in all layers."""
        return cls(ids, make_block_mask(ids) if ids.device.type == "cuda" else None)

    def positions(self) -> Tensor:
        """Return the position of each token in its document, (B, T)."""
        index = torch.arange(self.ids.size(1), device=self.ids.device)
        begins = F.pad(self.ids[:, 1:] != self.ids[:, :-1], (1, 0), value=True)
        return index - torch.where(begins, index, 0).cummax(dim=1).values

    def dense(self) -> Tensor:
        """Return booleans (B, 1, T, T), True where a query may attend: the plain form of this mask."""
        return (self.ids[:, :, None] == self.ids[:, None, :]).tril()[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Return the attention of q, k and v inside each document; all (B, H, T, D)."""
        if not dropout and q.device.type == "cpu":
            return DocumentAttention.apply(q, k, v, self.ids)
        if not dropout and self.block_mask is not None:
            return compiled_flex_attention()(q, k, v, block_mask=self.block_mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.dense(), dropout_p=dropout)


def make_block_mask(ids: Tensor) -> Any:
    """Return FlexAttention's BlockMask for document ids (B, T). The mask is the same for all heads."""
    # imported here: it takes a second, and only document masks on CUDA need it
    from torch.nn.attention.flex_attention import create_block_mask

    def may_attend(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[b, query] == ids[b, key])

    B, T = ids.shape
    return create_block_mask(may_attend, B, None, T, T, device=ids.device)


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    """Return FlexAttention as a fused kernel. Uncompiled, it would write the (T, T) weights to memory."""
    # imported here: it takes a second, and only document masks on CUDA need it
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class DocumentAttention(torch.autograd.Function):
    """`DocumentMask.attend` on a CPU: PyTorch's fused kernel is called for each document by itself."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        y, log_sums = attend_documents(q, k, v, ids)
        ctx.save_for_backward(q, k, v, y, log_sums, ids)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *document_gradients(dy, *ctx.saved_tensors), None


def find_documents(ids: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield a pair of slices (rows, tokens) for each document of ids (B, T).

    If neighboring rows have the same document borders, one slice `rows` covers all of them.
    """
    ends = [[*(torch.nonzero(row[1:] != row[:-1]).flatten() + 1).tolist(), len(row)] for row in ids]
    first = 0
    for row in range(1, len(ends) + 1):
        if row == len(ends) or ends[row] != ends[first]:
            begin = 0
            for end in ends[first]:
                yield slice(first, row), slice(begin, end)
                begin = end
            first = row


# These are custom operators, because the number and the lengths of the documents differ in every batch: torch.compile
# treats each operator as a single operation, and does not compile again for each batch.
@torch.library.custom_op("gpt2::attend_documents", mutates_args=())
def attend_documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention (B, H, T, D) inside each document, and the log of each softmax's denominator (B, H, T)."""
    y, log_sums = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    for rows, tokens in find_documents(ids):
        part = (t[rows, :, tokens] for t in (q, k, v))
        y[rows, :, tokens], log_sums[rows, :, tokens] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *part, 0.0, True
        )
    return y, log_sums


@attend_documents.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("gpt2::document_gradients", mutates_args=())
def document_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to q, k and v, given the gradient `dy` of the output; all (B, H, T, D).

    y and log_sums are the results of `attend_documents`.
    """
    gradients = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    for rows, tokens in find_documents(ids):
        part = [t[rows, :, tokens] for t in (dy, q, k, v, y, log_sums)]
        if q.dtype.itemsize < 4 and tokens.stop - tokens.start > SHORT:
            found = causal_attention_gradients(*part[:4])
        else:
            part = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in part]
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*part, 0.0, True)
        for whole, piece in zip(gradients, found, strict=True):
            whole[rows, :, tokens] = piece
    return gradients


@document_gradients.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
