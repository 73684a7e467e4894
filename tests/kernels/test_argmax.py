"""`kernels.argmax` against `Tensor.argmax`, which is its plain form."""

import pytest
import torch

from kernels.argmax import argmax

INF, NAN = float("inf"), float("nan")
ROWS = [
    [3.0, 1.0, 3.0, 2.0],  # the first of equal values
    [-INF, -INF, -INF, -INF],
    [-INF, 5.0, INF, INF],
    [1.0, NAN, INF, NAN],  # a NaN counts as the largest value, as in PyTorch
    [-0.0, 0.0, -1.0, -2.0],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_special_values(dtype):
    x = torch.tensor(ROWS, dtype=dtype)
    assert torch.equal(argmax(x), x.argmax(dim=-1))
    assert torch.equal(argmax(x[0]), x[0].argmax(dim=-1))


@pytest.mark.parametrize("shape", [(7,), (1, 50257), (3, 1025), (2, 3, 33), (0, 5)])
def test_random_values_with_many_equal_ones(shape):
    x = torch.randn(shape).mul(3).round()
    assert torch.equal(argmax(x), x.argmax(dim=-1))
    assert argmax(x).dtype == torch.int64
    strided = torch.randn(*shape, 2)[..., 0].requires_grad_()  # not contiguous, and with a gradient
    assert torch.equal(argmax(strided), strided.argmax(dim=-1))
