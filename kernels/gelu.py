"""GELU as in GPT-2, in a form that torch.compile turns into a faster kernel on a CPU, and other activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu(x: Tensor) -> Tensor:
    """Return x/2 (1 + tanh u) with u = √(2/π) (x + 0.044715 x³) (Hendrycks and Gimpel 2016)."""
    # OpenAI trained GPT-2 with this approximation. The exact form (with erf) differs from it by up to 5e-4, and would
    # change the logits of the released weights.
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # (1 + tanh u)/2 is sigmoid(2u). On a CPU, the compiler's kernel for sigmoid takes half the time of its tanh kernel.
    z = x.float()
    u = math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)
    return (z * torch.sigmoid(2 * u)).to(x.dtype)


# Activations by their names in transformers: first GPT-2's, then those of GPT-2 variants. "gelu" is the exact form
# with erf, which nanoGPT uses.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": gelu,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
