"""torch.compile captures the training loss as a single graph, without recompiling, and gives the same results."""

import shutil

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torch.nn import functional as F

from kernels.gelu import gelu
from kernels.loss import IGNORE_INDEX
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")


def training_loss(model):
    return lambda ids, targets: model(ids, targets=targets).loss


def small(seed=0, **fields):
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=300, block_size=32, n_layer=1, n_head=2, n_embd=32, **fields)
    return GPT(config).train()


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), pytest.param(torch.bfloat16, 2e-2, marks=pytest.mark.slow)]
)
def test_same_loss_and_gradients_without_recompiling(dtype, tolerance):
    compiled, plain = small(), small()
    step = torch.compile(training_loss(compiled), fullgraph=True, dynamic=False)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-3)
    graphs = []
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        ids, targets = torch.randint(300, (2, 4, 32), generator=generator)
        targets[0, : 5 + number] = IGNORE_INDEX
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = step(ids, targets)
        loss.backward()
        if number == 0:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                expected = training_loss(plain)(ids, targets)
            expected.backward()
            torch.testing.assert_close(loss, expected, atol=tolerance / 10, rtol=tolerance / 10)
            for (name, ours), other in zip(compiled.named_parameters(), plain.parameters(), strict=True):
                assert (ours.grad - other.grad).norm() <= tolerance * other.grad.norm(), name
        optimizer.step()
        optimizer.zero_grad(set_to_none=number % 2 == 0)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1] * 5
    assert not counters["graph_break"]
    assert not counters["recompiles"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.0)])
def test_gelu_is_the_tanh_form(dtype, tolerance):
    """Value and slope are about as close to float64 as those of PyTorch, although the compiled formula is another one.

    Where tanh or sigmoid is near 1, the slope contains their difference from 1, whose rounding error is multiplied by
    a factor that grows with x. The tolerance allows for that.
    """
    x = torch.cat([torch.linspace(-12, 12, 40_001), torch.tensor([-1e4, -100.0, 100.0, 1e4])]).to(dtype)

    def value_and_slope(function, x):
        x = x.clone().requires_grad_()
        y = function(x)
        return torch.stack([y.detach(), *torch.autograd.grad(y.sum(), x)]).double()

    def plain(x):
        return F.gelu(x, approximate="tanh")

    exact = value_and_slope(plain, x.double())
    found = value_and_slope(torch.compile(gelu, fullgraph=True), x)
    assert counters["stats"]["unique_graphs"] == 1
    error, plain_error = ((y - exact).abs() / exact.abs().clamp(min=1) for y in (found, value_and_slope(plain, x)))
    assert error.amax() <= plain_error.amax() + tolerance
    assert error.mean() <= plain_error.mean() + tolerance / 20


def test_evaluation_and_saving_use_the_same_weights(tmp_path):
    """Compiling the loss function leaves the module itself unchanged, including the names of its parameters."""
    model = small()
    ids = torch.randint(300, (2, 32))
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(training_loss(model), backend="aot_eager", fullgraph=True, dynamic=False)(ids, ids).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("frozen", ["embeddings", "blocks", "dropout"])
def test_fine_tuning_compiles(frozen):
    model = small(dropout=0.1 if frozen == "dropout" else 0.0)
    if frozen == "embeddings":
        model.freeze()
    if frozen == "blocks":
        model.freeze(layers=1, embeddings=False)
    ids = torch.randint(300, (2, 32))
    step = torch.compile(training_loss(model), backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        step(ids, ids).backward()
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
@torch.no_grad()
def test_one_graph_decodes_at_every_length(padded):
    """The buffers of a cache keep their shapes. Only a pass that fills the last position needs a graph of its own."""
    model = small().eval()
    ids, mask = torch.randint(300, (2, 31)), torch.ones(2, 32, dtype=torch.long)
    mask[0, :3] = 0

    def logits(ids, cache, mask):
        return model(ids, cache=cache, attention_mask=mask).logits

    def mask_of(length):
        return mask[:, :length] if padded else None

    step, cache = torch.compile(logits, backend="aot_eager", fullgraph=True, dynamic=True), model.new_cache(2, 32)
    found = [logits(ids[:, :8], cache, mask_of(8))]
    found += [step(ids[:, i : i + 1].contiguous(), cache, mask_of(i + 1)) for i in range(8, 31)]
    torch.testing.assert_close(torch.cat(found, dim=1), logits(ids, None, mask_of(31)), atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


class Logits(torch.nn.Module):
    """The logits alone: exporters need a forward pass from tensors to tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_the_model_is_exported_and_traced_for_any_length():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=90, block_size=24, n_layer=2, n_head=2, n_embd=16)).eval()
    example = torch.randint(90, (2, 8))
    lengths = torch.export.Dim("length", min=2, max=24)
    exported = torch.export.export(Logits(model), (example,), dynamic_shapes=({1: lengths},)).module()
    traced = torch.jit.trace(Logits(model), (example,))
    for length in (2, 7, 24):
        ids = torch.randint(90, (2, length))
        expected = model(ids).logits
        torch.testing.assert_close(exported(ids), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(traced(ids), expected, atol=1e-6, rtol=1e-6)
