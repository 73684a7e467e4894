"""GPT-2's forward pass for one token of one sequence, in NumPy.

For a single row, a matrix product reads each weight once and computes little, so the speed of the memory limits it. In
float32, NumPy's matrix products come closer to this limit than PyTorch's (measured on an AMD EPYC, Zen 3). The other
operations are so small that most of their time is the cost of a call, which is lower in NumPy, too.

NumPy does not read `torch.set_num_threads`. The environment variable OMP_NUM_THREADS limits the threads of both.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from model import GPT, MLP, Attention, Block, KVCache, Transformer

Array: TypeAlias = np.ndarray

# A step computes what these modules compute. Other modules, such as packed layers or adapters, may compute more.
MODULES = {GPT, Transformer, Block, Attention, MLP, nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout}


def numpy_can_read(model: GPT) -> bool:
    """Return whether a `NumpyStep` computes what the model does: on a CPU, in float32, with unchanged modules."""
    if model.config.attention != "full" or torch.is_autocast_enabled("cpu"):
        return False
    # The type excludes sharded and quantized parameters.
    parameters = {(type(p), p.device.type, p.dtype) for p in model.parameters()}
    return parameters == {(nn.Parameter, "cpu", torch.float32)} and all(map(is_unchanged, model.modules()))


def is_unchanged(module: nn.Module) -> bool:
    """Return whether a module, in eval mode, computes what its class defines: no hooks, and no method replaced."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    has_bias = getattr(module, "bias", True) is not None
    return type(module) in MODULES and has_bias and not (hooked or module.training)


def arrays(layer: nn.Linear | nn.LayerNorm) -> tuple[Array, Array]:
    """Return a layer's weight and bias, as arrays that share the memory of its parameters."""
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


class Linear(NamedTuple):
    """W x + b."""

    weight: Array  # (out, in)
    bias: Array  # (out,)

    def __call__(self, x: Array) -> Array:
        return self.weight @ x + self.bias


class LayerNorm(NamedTuple):
    """Normalize x (C,) to mean 0 and variance 1, then scale and shift each channel."""

    weight: Array  # (C,)
    bias: Array  # (C,)
    eps: float

    def __call__(self, x: Array) -> Array:
        x = x - x.sum() / len(x)
        x /= math.sqrt(x @ x / len(x) + self.eps)
        return x * self.weight + self.bias


class NumpyBlock:
    """A `Block` with its layer of the cache. The arrays share the memory of the model's and the cache's tensors."""

    def __init__(self, block: Block, keys: Tensor, values: Tensor) -> None:
        self.ln_1, self.ln_2 = (LayerNorm(*arrays(layer), layer.eps) for layer in (block.ln_1, block.ln_2))
        self.c_attn, self.attn_proj = Linear(*arrays(block.attn.c_attn)), Linear(*arrays(block.attn.c_proj))
        self.c_fc, self.mlp_proj = Linear(*arrays(block.mlp.c_fc)), Linear(*arrays(block.mlp.c_proj))
        self.activation = block.mlp.activation
        self.keys, self.values = keys[0].numpy(), values[0].numpy()  # (H, max_length, D)

    def __call__(self, x: Array, position: int) -> Array:
        """Return the new residual stream (C,) of the token at `position`."""
        x = x + self.attention(self.ln_1(x), position)
        return x + self.mlp(self.ln_2(x))

    def attention(self, x: Array, position: int) -> Array:
        """Return the result of attention (C,), and write the token's key and value into the cache."""
        H, _, D = self.keys.shape
        q, self.keys[:, position], self.values[:, position] = self.c_attn(x).reshape(3, H, D)
        keys, values = self.keys[:, : position + 1], self.values[:, : position + 1]  # (H, S, D)
        scores = np.matvec(keys, q / math.sqrt(D))  # (H, S)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        y = np.vecmat(weights, values) / weights.sum(axis=1, keepdims=True)  # (H, D)
        return self.attn_proj(y.ravel())

    def mlp(self, x: Array) -> Array:
        """Return the result of the MLP (C,)."""
        return self.mlp_proj(self.activation(torch.from_numpy(self.c_fc(x))).numpy())


class NumpyStep:
    """A step that reads one more token of a single sequence. Its logits equal the model's, apart from rounding."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        """Continue after the tokens that `cache` holds. `numpy_can_read` must hold for the model."""
        transformer = model.transformer
        self.wte, self.wpe = (layer.weight.detach().numpy() for layer in (transformer.wte, transformer.wpe))
        caches = zip(cache.keys, cache.values, strict=True)
        self.blocks = [
            NumpyBlock(cast(Block, block), *cache) for block, cache in zip(transformer.h, caches, strict=True)
        ]
        self.ln_f = LayerNorm(*arrays(transformer.ln_f), transformer.ln_f.eps)
        self.cache = cache

    def __call__(self, tokens: Tensor) -> Tensor:
        """Add `tokens` (1, 1) to the cache, and return the logits (1, V) of the token after it."""
        position = self.cache.length
        x = self.wte[int(tokens)] + self.wpe[position]  # (C,)
        for block in self.blocks:
            x = block(x, position)
        self.cache.length += 1
        return torch.from_numpy(self.wte @ self.ln_f(x))[None]
