"""`CausalAttention` against its plain form and PyTorch's own backward pass; the choice of a kernel on CUDA."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from kernels import attention
from kernels.attention import CausalAttention, attention_backends, plain_causal_attention, use_newer_flash_attention
from model import GPT, GPTConfig


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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_cudnn_is_allowed_on_cuda_only_where_the_shapes_do_not_change(monkeypatch, training, padded):
    seen = []
    real = F.scaled_dot_product_attention

    def record(*inputs, **options):
        seen.append(set(_cur_sdpa_kernel_backends()))
        return real(*inputs, **options)

    def on_cuda(device, *, fixed_shapes):
        assert device.type == "cpu"
        return attention_backends(torch.device("cuda"), fixed_shapes=fixed_shapes)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(attention, "attention_backends", on_cuda)
    model = GPT(GPTConfig(vocab_size=9, block_size=4, n_layer=1, n_head=1, n_embd=8)).train(training)
    before = set(_cur_sdpa_kernel_backends())
    ids = torch.ones(1, 3, dtype=torch.long)
    model(ids, targets=ids, attention_mask=ids if padded else None)
    any_shape = {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}
    assert SDPBackend.CUDNN_ATTENTION in before
    assert seen == [before if training and not padded else any_shape]
    assert set(_cur_sdpa_kernel_backends()) == before


@pytest.mark.parametrize(
    ("card", "dropout", "installed", "expected"),
    [
        (9, 0.0, {"flash_attn_interface"}, "FA3"),
        (10, 0.0, {"flash_attn.cute"}, "FA4"),
        (9, 0.0, {"flash_attn.cute"}, None),
        (9, 0.1, {"flash_attn_interface"}, None),
        (8, 0.0, {"flash_attn_interface", "flash_attn.cute"}, None),
    ],
)
def test_a_newer_flash_attention_is_used_on_the_card_that_it_is_made_for(
    monkeypatch, card, dropout, installed, expected
):
    done = []
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (card, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace() if name in installed else None)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", done.append)
    monkeypatch.setattr("torch.backends.cuda.enable_cudnn_sdp", done.append)
    assert use_newer_flash_attention(torch.device("cuda"), dropout) == expected
    assert done == ([] if expected is None else [expected, False])
    assert use_newer_flash_attention(torch.device("cpu"), 0.0) is None


def test_a_flash_attention_that_does_not_fit_this_pytorch_is_not_used(monkeypatch):
    def fail(name):
        raise RuntimeError("Module does not expose FA3 kernels")

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(attention, "activate_flash_attention_impl", fail)
    assert use_newer_flash_attention(torch.device("cuda"), 0.0) is None
