"""Store a model's weights in a layout that makes decoding faster on a CPU.

oneDNN, which computes matrix products for PyTorch on a CPU, reads weights in a memory layout of its own. In decoding,
each product has only a few rows, so converting the weights for every product would take a large part of the time.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from device import packing_is_faster
from generation.numpy_step import numpy_can_read
from kernels.loss import centered_head
from model import GPT


class PackedLinear(nn.Module):
    """Compute x Wᵀ + b on a CPU, with W stored in the memory layout that oneDNN's kernels read."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class DecodingHead(nn.Module):
    """Compute float32 logits (N, V) from hidden states (N, C), with a matrix product in the dtype of the weights.

    If the dtype is less precise than float32, the product uses the weight minus its mean row (see `centered_head`).
    Then the product of x and the mean row is added in float32, which restores the original logits.
    """

    def __init__(self, weight: Tensor, *, pack: bool) -> None:
        super().__init__()
        head = centered_head(weight.detach(), weight.dtype)
        self.product = PackedLinear(head, None) if pack else partial(F.linear, weight=head)
        self.mean = None if weight.dtype == torch.float32 else weight.detach().mean(dim=0, dtype=torch.float32)  # (C,)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.product(x).float()
        return logits if self.mean is None else logits + (x.float() @ self.mean).unsqueeze(1)


def pack_weights(model: GPT, rows: int) -> None:
    """Prepare a model to decode `rows` rows at a time: add a `DecodingHead`, and pack linear layers if that is faster.

    Afterwards the model can only decode: it cannot be trained, saved or moved to another device. A model that a
    `NumpyStep` will decode is not changed, because a NumpyStep reads unpacked weights.
    """
    if rows == 1 and numpy_can_read(model):
        return
    weight = model.transformer.wte.weight
    pack = packing_is_faster(weight)
    linears = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    for module, name, child in linears if pack else ():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias))
    model.add_module("decoding_head", DecodingHead(weight, pack=pack))
