"""The loss in its form for a GPU, run on a CPU: the same value and gradients as the plain form."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cuda_loss
from kernels.cuda_loss import HEAD_MULTIPLE, cuda_loss_and_gradients, softmax_gradient
from kernels.loss import IGNORE_INDEX, linear_cross_entropy_sum, loss_and_gradients, plain_linear_cross_entropy


@pytest.fixture(params=["eager", "compiled"])
def few_rows(request, monkeypatch):
    """Hold 64 rows of logits at a time, with the pointwise part as it stands and compiled."""
    monkeypatch.setattr(cuda_loss, "rows_at_a_time", lambda *arguments: 64)
    if request.param == "eager":
        monkeypatch.setattr(cuda_loss, "compiled_softmax_gradient", lambda: softmax_gradient)


def example(n_rows, vocab_size, n_channels=24):
    torch.manual_seed(n_rows)
    x = torch.randn(n_rows, n_channels, requires_grad=True)
    weight = (torch.randn(vocab_size, n_channels) / 4).requires_grad_()
    targets = torch.randint(vocab_size, (n_rows,))
    targets[torch.rand(n_rows) < 0.2] = IGNORE_INDEX
    targets[0] = vocab_size - 1
    return x, weight, targets


@pytest.mark.parametrize("vocab_size", [1001, 1024, 97])  # odd; a multiple of the padding; smaller than it
@pytest.mark.parametrize("n_rows", [1, 64, 130, 200])
def test_it_equals_the_plain_form(few_rows, n_rows, vocab_size):
    x, weight, targets = example(n_rows, vocab_size)
    expected = plain_linear_cross_entropy(x, weight, targets) * (targets != IGNORE_INDEX).sum()
    expected.backward()
    with torch.no_grad():
        total, dx, dweight = cuda_loss_and_gradients(x, weight, targets, torch.float32, True, True)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dweight, weight.grad, rtol=1e-5, atol=1e-5)
    assert dweight.shape == weight.shape  # the padding stays inside


@torch.no_grad()
def test_only_the_gradients_that_are_requested_are_computed(few_rows):
    x, weight, targets = example(70, 101)
    both = cuda_loss_and_gradients(x, weight, targets, torch.float32, True, True)
    for x_grad, weight_grad in [(True, False), (False, True), (False, False)]:
        total, dx, dweight = cuda_loss_and_gradients(x, weight, targets, torch.float32, x_grad, weight_grad)
        assert torch.equal(total, both[0])
        assert torch.equal(dx, both[1]) if x_grad else dx.numel() == 0
        assert torch.equal(dweight, both[2]) if weight_grad else dweight.numel() == 0


@torch.no_grad()
def test_targets_that_are_all_ignored_give_zero(few_rows):
    x, weight, targets = example(70, 101)
    total, dx, dweight = cuda_loss_and_gradients(
        x, weight, torch.full_like(targets, IGNORE_INDEX), torch.float32, True, True
    )
    assert not total
    assert not dx.any()
    assert not dweight.any()


@torch.no_grad()
@pytest.mark.parametrize("function", [cuda_loss_and_gradients, loss_and_gradients])
def test_a_batch_without_tokens_has_no_loss(monkeypatch, function):
    monkeypatch.setattr(cuda_loss, "compiled_softmax_gradient", lambda: softmax_gradient)
    x, weight, targets = (t[:0] if t.size(0) == 70 else t for t in example(70, 101))
    total, dx, dweight = function(x, weight, targets, torch.float32, True, True)
    assert not total
    assert dx.shape == x.shape
    assert not dweight.any()


class Products(TorchDispatchMode):
    """Collects the shapes and strides of the operands of matrix products."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.operands += [arg for arg in args if isinstance(arg, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", [-1, 211, 255, 256, 100_000])
def test_the_loss_of_a_target_outside_the_vocabulary_is_nan(target):
    logits, targets = torch.randn(3, 256), torch.tensor([5, target, IGNORE_INDEX])
    assert softmax_gradient(logits, targets, vocab_size=211).isnan()


@torch.no_grad()
def test_rows_of_logits_begin_at_aligned_addresses(monkeypatch):
    """With a row stride of 50,257, every second row would begin at an odd address, which is slow on a GPU."""
    monkeypatch.setattr(cuda_loss, "compiled_softmax_gradient", lambda: softmax_gradient)
    x, weight, targets = example(40, 50257, 16)
    with Products() as products:
        cuda_loss_and_gradients(x, weight, targets, torch.float32, True, True)
    wide = [t for t in products.operands if max(t.shape) >= 50257]
    assert wide
    assert all(stride == 1 or stride % 8 == 0 for t in products.operands for stride in t.stride())
    assert all(size % HEAD_MULTIPLE == 0 for t in wide for size in t.shape if size > 40)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_near_float32(dtype, few_rows):
    x, weight, targets = example(130, 1001)
    exact = cuda_loss_and_gradients(x, weight, targets, torch.float32, True, True)
    found = cuda_loss_and_gradients(x, weight, targets, dtype, True, True)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    for a, b, tolerance in zip(found, exact, (1e-3, 1e-2, 1e-2), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(("x_grad", "weight_grad"), [(True, True), (True, False), (False, False)])
def test_the_operator_is_well_formed(x_grad, weight_grad):
    """PyTorch's own checks of a custom operator."""
    x, weight, targets = example(70, 101)
    x.requires_grad_(x_grad)
    weight.requires_grad_(weight_grad)
    torch.library.opcheck(linear_cross_entropy_sum, (x, weight, targets, torch.float32, x_grad, weight_grad))


@pytest.mark.parametrize(
    ("gib", "vocab_size", "itemsize", "rows"),
    [
        (79, 50257, 2, 8192),  # H100: 824 MB of logits
        (40, 50257, 2, 4096),
        (24, 50257, 2, 2048),
        (15, 50257, 2, 1024),  # T4
        (15, 50257, 4, 512),
        (24, 4096, 2, 8192),
        (1, 50257, 4, 512),
    ],
)
def test_more_memory_holds_more_rows(gib, vocab_size, itemsize, rows):
    assert cuda_loss.rows_at_a_time(gib * 2**30, vocab_size, itemsize) == rows


def test_cuda_takes_this_form():
    assert linear_cross_entropy_sum._backend_fns.keys() >= {"cuda"}


@torch.no_grad()
def test_without_a_compiler_it_runs_as_it_stands(monkeypatch, capsys):
    from torch._dynamo.exc import TorchDynamoException

    def fail(*arguments):
        raise TorchDynamoException("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    cuda_loss.compiled_softmax_gradient.cache_clear()
    x, weight, targets = example(70, 101)
    total, _, _ = cuda_loss_and_gradients(x, weight, targets, torch.float32, False, False)
    cuda_loss.compiled_softmax_gradient.cache_clear()
    expected = plain_linear_cross_entropy(x, weight, targets) * (targets != IGNORE_INDEX).sum()
    torch.testing.assert_close(total, expected.detach())
    assert "compiling the loss failed" in (errors := capsys.readouterr().err)
    assert "no C++ compiler" in errors
