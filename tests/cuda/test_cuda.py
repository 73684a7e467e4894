"""Tests for a machine with a GPU: `pytest -m cuda`. Elsewhere they are skipped. docs/gpu.md has the larger checks."""

import pytest
import torch
from torch import Generator
from torch.nn import functional as F

import generation.forward
from generation import generate
from kernels.cuda_loss import cuda_loss_and_gradients
from kernels.loss import IGNORE_INDEX
from model import GPT, GPTConfig

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")]


@pytest.mark.parametrize("part", range(1, 10))
def test_a_part_of_gpu_check_with_tiny_shapes(python, part):
    result = python("-m", "scripts.gpu_check", "--device", "cuda", "--tiny", "--parts", part, check=False, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def model():
    """A small model whose greedy text does not repeat itself."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=96, n_layer=2, n_head=2, n_embd=32)).cuda().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return model


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 50}, {"repetition_penalty": 1.3}, {"num_beams": 3}], ids=str
)
@pytest.mark.parametrize("eos", [None, list(range(0, 257, 12))], ids=["to the end", "rows that end"])
def test_decoding_with_a_graph_equals_the_plain_loop(model, monkeypatch, capsys, options, eos):
    prompts = [[1, 2, 3, 4], [5], [6, 7], [8, 9, 10]]
    results = []
    for fixed in (True, False):
        if not fixed:
            monkeypatch.setattr(generation.forward, "uses_fixed_step", lambda model, options: False)
            monkeypatch.setattr("generation.sampling.steps_between_checks", lambda device, options: 1)
        generator = Generator("cuda").manual_seed(3)
        results.append(generate(model, prompts, max_new_tokens=60, eos_token_id=eos, generator=generator, **options))
    assert torch.equal(*results)
    assert "without a CUDA graph" not in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_equals_cross_entropy(rows, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 64, device="cuda"), torch.randn(50257, 64, device="cuda") * 0.1
    targets = torch.randint(50257, (rows,), device="cuda")
    targets[1::3] = IGNORE_INDEX
    loss, dx, dweight = cuda_loss_and_gradients(x, weight, targets, dtype, True, True)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    expected.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert abs(loss - expected) <= tolerance * expected
    for found, exact in ((dx, x.grad), (dweight, weight.grad)):
        assert (found.double() - exact).norm() <= tolerance * exact.norm()
