"""`CausalAttention` against its plain form, and its accuracy against that of PyTorch's own backward pass."""

import pytest
import torch
from torch.nn import functional as F

from kernels import attention
from kernels.attention import CausalAttention, plain_causal_attention


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def random_inputs(T, scale, dtype):
    """q, k, v and dy, (2, 3, T, 40), with heads interleaved in memory as in the model."""
    torch.manual_seed(T)
    q, k, v, dy = (torch.randn(2, T, 3, 40).transpose(1, 2).to(dtype) for _ in range(4))
    return q * scale, k * scale, v, dy


def gradients(function, inputs, dtype):
    """The gradients with respect to q, k and v, computed in `dtype`, as one float64 tensor."""
    *qkv, dy = (t.to(dtype) for t in inputs)
    qkv = [t.requires_grad_() for t in qkv]
    return torch.cat([g.double() for g in torch.autograd.grad(function(*qkv), qkv, dy)])


@pytest.mark.parametrize("T", [1, 2, 128, 300])
def test_float32_equals_the_plain_form(T):
    inputs = random_inputs(T, 1.0, torch.float32)
    q, k, v, _ = inputs
    torch.testing.assert_close(CausalAttention.apply(q, k, v), plain_causal_attention(q, k, v))
    found, expected = (gradients(f, inputs, torch.float32) for f in (CausalAttention.apply, plain_causal_attention))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("T", [1, 2, 128, 300])
@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_as_accurate_as_those_of_pytorch(T, scale, dtype, monkeypatch):
    inputs = random_inputs(T, scale, dtype)
    exact = gradients(plain_causal_attention, inputs, torch.float64)
    found = gradients(CausalAttention.apply, inputs, dtype)
    assert (found - exact).norm() <= 1.1 * (gradients(fused, inputs, dtype) - exact).norm()
    monkeypatch.setattr(attention, "BLOCK_WEIGHTS", 1)  # one sequence at a time
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 17)  # blocks that do not divide the sequence
    assert (gradients(CausalAttention.apply, inputs, dtype) - found).norm() <= 5e-3 * exact.norm()
