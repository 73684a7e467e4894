"""`linear_cross_entropy` against its plain form."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.loss import IGNORE_INDEX, MATMUL_ROWS, linear_cross_entropy, loss_and_gradients, plain_linear_cross_entropy
from model import GPT, GPTConfig


def relative_error(found, expected):
    return (found - expected).norm() / expected.norm()


@pytest.mark.parametrize("N", [1, 7, 130, MATMUL_ROWS * 2 + 77])
@pytest.mark.parametrize("frozen", ["", "x", "weight"])
def test_loss_and_gradients_equal_the_plain_form(N, frozen):
    torch.manual_seed(N)
    x, weight = torch.randn(N, 24), torch.randn(9001, 24) / 4
    targets = torch.randint(9001, (N,))
    targets[torch.rand(N) < 0.2] = IGNORE_INDEX
    targets[0] = 9000
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    loss = linear_cross_entropy(x, weight, targets)
    (3 * loss).backward()  # times 3: the gradient of the result must be passed on
    gradients = x.grad, weight.grad
    x.grad = weight.grad = None
    expected = plain_linear_cross_entropy(x, weight, targets)
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for gradient, other in zip(gradients, (x.grad, weight.grad), strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            assert relative_error(gradient, other) <= 1e-5


@torch.no_grad()
def test_the_plain_form_is_the_mean_cross_entropy():
    x, weight, targets = torch.randn(40, 8), torch.randn(30, 8), torch.randint(30, (40,))
    targets[::3] = IGNORE_INDEX
    expected = F.cross_entropy(F.linear(x, weight), targets)
    torch.testing.assert_close(plain_linear_cross_entropy(x, weight, targets), expected)


def test_loss_of_a_target_whose_probability_rounds_to_zero():
    """The probability is 0 in float32, but the loss is finite."""
    x, weight = torch.eye(3), torch.tensor([[300.0, 0, 0], [0, 100, 0], [-300, 0, 50]])
    targets = torch.tensor([2, 0, 1])
    loss = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, torch.tensor((600 + 100 + 50) / 3), atol=0, rtol=1e-6)


def test_forward_mode_is_an_error_instead_of_zero():
    x, weight, targets = torch.randn(5, 8), torch.randn(20, 8), torch.arange(5)
    for argument in (0, 1):
        inputs = [x, weight]

        def loss(value, inputs=inputs, argument=argument):
            inputs[argument] = value
            return linear_cross_entropy(*inputs, targets)

        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.func.jvp(loss, (inputs[argument],), (torch.ones_like(inputs[argument]),))


def test_loss_without_any_target_is_zero():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.full((5,), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def loss_and_grads(function, inputs, targets, dtype):
    """Loss and gradients of (x, weight), under autocast to `dtype` unless that is float32."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.autocast(targets.device.type, dtype, enabled=dtype != torch.float32):
        loss = function(*inputs, targets)
    loss.backward()
    return loss.detach(), inputs[0].grad, inputs[1].grad


def test_loss_under_autocast_is_as_accurate_as_the_plain_form():
    """Compares root mean squares over eight draws, because a single loss is one number and may be right by chance."""
    squares = torch.zeros(2, 3)
    for seed in range(8):
        torch.manual_seed(seed)
        inputs, targets = (torch.randn(700, 64), torch.randn(500, 64) / 4), torch.randint(500, (700,))
        exact = loss_and_grads(plain_linear_cross_entropy, inputs, targets, torch.float32)
        for row, function in enumerate((plain_linear_cross_entropy, linear_cross_entropy)):
            found = loss_and_grads(function, inputs, targets, torch.bfloat16)
            squares[row] += torch.stack([relative_error(a, e) ** 2 for a, e in zip(found, exact, strict=True)])
    plain_error, error = squares.sqrt()
    assert (error <= torch.tensor([1.5, 1.1, 1.1]) * plain_error).all()


def test_an_offset_common_to_all_logits_costs_no_accuracy_under_autocast():
    """The logits of the released GPT-2 have such an offset: they lie near -80, where bfloat16 has steps of 0.5."""
    torch.manual_seed(0)
    x, weight = (torch.randn(300, 64) + 4).bfloat16().float(), (torch.randn(500, 64) / 4 - 80 / (4 * 64))
    targets = torch.randint(500, (300,))
    exact = plain_linear_cross_entropy(x.double(), weight.double(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = (f(x, weight, targets) for f in (plain_linear_cross_entropy, linear_cross_entropy))
    assert (found - exact).abs() < 0.2 * (plain - exact).abs()


class LargestFloat32(TorchDispatchMode):
    """Records the size of the largest float32 tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B", [1, 4, 24])
def test_the_float32_logits_of_a_batch_never_exist_at_once(B, dtype):
    V, T = 5024, 64  # a multiple of ROW_MULTIPLE, so that the rows of logits have no padding
    model = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=1, n_head=1, n_embd=8)).train()
    ids = torch.randint(V, (B, T))
    with LargestFloat32() as largest, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(ids, targets=ids).loss.backward()
    assert largest.numel < B * T * V
    # The dispatch mode above sees the operator as a single call. Look at the operations inside it too.
    x = torch.randn(B * T, 8)
    with torch.no_grad(), LargestFloat32() as largest:
        loss_and_gradients(x, model.transformer.wte.weight, ids.flatten(), dtype, True, True)
    # In bfloat16 only the softmax is in float32, 64 rows at a time. In float16 a block of the gradient is, too.
    rows = min(B * T, 128) if dtype == torch.bfloat16 else min(B * T / 2, MATMUL_ROWS)
    assert 0 < largest.numel <= rows * V


class LogitsStrides(TorchDispatchMode):
    """Records the row strides of the tensors that matrix products write to with `out`."""

    def __init__(self):
        super().__init__()
        self.strides = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "out" in (kwargs or {}) and function.overloadpacket.__name__ == "mm":
            self.strides.append(kwargs["out"].stride(0))
        return function(*args, **(kwargs or {}))


def test_rows_of_logits_begin_at_a_multiple_of_32_columns():
    x, weight, targets = torch.randn(1100, 8), torch.randn(257, 8), torch.randint(257, (1100,))
    with LogitsStrides() as mode:
        loss_and_gradients(x, weight, targets, torch.float32, True, True)
    assert mode.strides == [288, 288, 288]


# ---- float16, whose largest number is 65,504


def test_float16_is_as_accurate_as_its_precision():
    """The unit roundoff of float16 is 4.9e-4. Gradients are products of rounded factors, so a few times that."""
    torch.manual_seed(0)
    inputs, targets = (torch.randn(700, 64), torch.randn(9001, 64) / 4), torch.randint(9001, (700,))
    targets[::5] = IGNORE_INDEX
    exact = loss_and_grads(plain_linear_cross_entropy, inputs, targets, torch.float32)
    loss, dx, dweight = loss_and_grads(linear_cross_entropy, inputs, targets, torch.float16)
    assert dx.dtype == dweight.dtype == torch.float32
    assert relative_error(loss, exact[0]) <= 1e-4
    assert relative_error(dx, exact[1]) <= 1e-3
    assert relative_error(dweight, exact[2]) <= 1e-3


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_float16_does_not_overflow_where_all_targets_are_equal(device):
    """One channel of the hidden states is near 300, as in the released GPT-2. Its sum over 512 rows exceeds 65,504."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(2 * MATMUL_ROWS, 64), torch.randn(500, 64) / 8, torch.full((2 * MATMUL_ROWS,), 7)
    x[:, 5] = 300 + 10 * x[:, 5]
    weight[:, 5] = 0.01 * weight[:, 5]
    product = torch.full((1, MATMUL_ROWS), -1.0).half() @ x[:MATMUL_ROWS].half()
    assert product[0, 5].isinf()  # a product with a float16 result, as a kernel without this precaution computes it
    inputs, targets = (x.to(device), weight.to(device)), targets.to(device)
    exact = loss_and_grads(plain_linear_cross_entropy, inputs, targets, torch.float32)
    found = loss_and_grads(linear_cross_entropy, inputs, targets, torch.float16)
    for ours, expected in zip(found, exact, strict=True):
        assert relative_error(ours, expected) <= 2e-3
    assert (exact[2][7, 5] * len(targets)).abs() > 2 * torch.finfo(torch.float16).max  # the sum over all rows
