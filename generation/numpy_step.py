"""GPT-2's forward pass for one token of one sequence, in NumPy.

For a single row, a matrix product uses each weight only once, so it cannot be faster than reading the weights from
memory. In float32, NumPy's matrix products come closer to this limit than PyTorch's (measured on an AMD EPYC, Zen 3).
Small operations also have less overhead in NumPy.

`torch.set_num_threads` has no effect on NumPy. The environment variable OMP_NUM_THREADS limits the threads of NumPy and
of PyTorch.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from model import GPT, MLP, Attention, Block, KVCache, Transformer

Array: TypeAlias = np.ndarray

# The classes of the modules that a NumpyStep can replace. A model with other modules, such as packed layers or
# adapters, may compute something else.
MODULES = {GPT, Transformer, Block, Attention, MLP, nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout}


def numpy_can_read(model: GPT) -> bool:
    """Return whether a `NumpyStep` computes what the model does.

    The model must have full attention, float32 weights on a CPU and only unchanged modules (see `is_unchanged`), and
    autocast must be off.
    """
    if model.config.attention != "full" or torch.is_autocast_enabled("cpu"):
        return False
    # The type of a sharded or quantized parameter is not nn.Parameter, so such a model fails the comparison below.
    parameters = {(type(p), p.device.type, p.dtype) for p in model.parameters()}
    return parameters == {(nn.Parameter, "cpu", torch.float32)} and all(map(is_unchanged, model.modules()))


def is_unchanged(module: nn.Module) -> bool:
    """Return whether a module computes what a `NumpyStep` computes for its class.

    The class must be in MODULES, a layer that can have a bias must have one, and the module must be in eval mode,
    without hooks and without a replaced `forward`.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    has_bias = getattr(module, "bias", True) is not None
    return type(module) in MODULES and has_bias and not (hooked or module.training)


def arrays(layer: nn.Linear | nn.LayerNorm) -> tuple[Array, Array]:
    """Return a layer's weight and bias, as arrays that share the memory of its parameters."""
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


class Linear(NamedTuple):
    """Compute W x + b for a vector x (in,). The result is (out,)."""

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
    """A `Block` of the model and its layer of the KVCache, as NumPy arrays that share the memory of their tensors."""

    def __init__(self, block: Block, keys: Tensor, values: Tensor) -> None:
        self.ln_1, self.ln_2 = (LayerNorm(*arrays(layer), layer.eps) for layer in (block.ln_1, block.ln_2))
        self.c_attn, self.attn_proj = Linear(*arrays(block.attn.c_attn)), Linear(*arrays(block.attn.c_proj))
        self.c_fc, self.mlp_proj = Linear(*arrays(block.mlp.c_fc)), Linear(*arrays(block.mlp.c_proj))
        self.activation = block.mlp.activation
        self.keys, self.values = keys[0].numpy(), values[0].numpy()  # (H, max_length, D)

    def __call__(self, x: Array, position: int) -> Array:
        """Return x (C,), the residual stream of the token at `position`, plus the results of attention and MLP."""
        x = x + self.attention(self.ln_1(x), position)
        return x + self.mlp(self.ln_2(x))

    def attention(self, x: Array, position: int) -> Array:
        """Return the result of attention (C,) for x (C,), and write the token's key and value into the cache."""
        H, _, D = self.keys.shape
        q, self.keys[:, position], self.values[:, position] = self.c_attn(x).reshape(3, H, D)
        keys, values = self.keys[:, : position + 1], self.values[:, : position + 1]  # (H, S, D), S = position + 1
        scores = np.matvec(keys, q / math.sqrt(D))  # (H, S)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        y = np.vecmat(weights, values) / weights.sum(axis=1, keepdims=True)  # (H, D)
        return self.attn_proj(y.ravel())

    def mlp(self, x: Array) -> Array:
        """Return the result of the MLP (C,) for x (C,)."""
        return self.mlp_proj(self.activation(torch.from_numpy(self.c_fc(x))).numpy())


class NumpyStep:
    """A step that reads one more token of a single sequence. Its logits equal the model's, apart from rounding."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        """Continue after the tokens that `cache` holds. `numpy_can_read(model)` must be True."""
        transformer = model.transformer
        self.wte, self.wpe = (layer.weight.detach().numpy() for layer in (transformer.wte, transformer.wpe))
        caches = zip(cache.keys, cache.values, strict=True)
        self.blocks = [
            NumpyBlock(cast(Block, block), *cache) for block, cache in zip(transformer.h, caches, strict=True)
        ]
        self.ln_f = LayerNorm(*arrays(transformer.ln_f), transformer.ln_f.eps)
        self.cache = cache

    def __call__(self, tokens: Tensor) -> Tensor:
        """Add one token, `tokens` (1, 1), to the cache, and return the logits (1, V) of the token after it."""
        position = self.cache.length
        x = self.wte[int(tokens)] + self.wpe[position]  # (C,)
        for block in self.blocks:
            x = block(x, position)
        self.cache.length += 1
        return torch.from_numpy(self.wte @ self.ln_f(x))[None]
