"""Test that packed weights give the same text and accurate logits."""

import copy

import pytest
import torch
from torch import Generator

from generation import generate, pack_weights
from generation.packed import PackedLinear
from model import GPT, GPTConfig
from tests.generation.twins import SHAPES, make_pair, ragged_batch


@pytest.mark.parametrize("intel", [False, True])
def test_packed_weights_choose_the_same_tokens(tmp_path, monkeypatch, intel):
    monkeypatch.setattr("device.is_intel_cpu", lambda: intel)
    _, model = make_pair(SHAPES[2], tmp_path)
    ids, mask = ragged_batch(500)
    expected = generate(model, ids, attention_mask=mask, max_new_tokens=40, return_dict=True, output_logits=True)
    pack_weights(model, rows=4)
    assert any(isinstance(module, PackedLinear) for module in model.modules()) == (not intel)
    output = generate(model, ids, attention_mask=mask, max_new_tokens=40, return_dict=True, output_logits=True)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.logits[-1], expected.logits[-1], atol=1e-3, rtol=1e-4)


def test_packed_logits_with_a_common_offset_are_accurate_in_bfloat16():
    """GPT-2's logits are near -80, where bfloat16 has steps of 0.5. The reference is float32 with the same weights."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=64)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(4.0)
        model.transformer.wte.weight.sub_(80 / (4.0 * model.config.n_embd))
    model.bfloat16()
    ids = torch.randint(257, (3, 9), generator=Generator().manual_seed(0))

    def logits(model):
        options = {"max_new_tokens": 1, "return_dict": True, "output_logits": True}
        return generate(model, ids, **options).logits[0]

    plain, exact = logits(model), logits(copy.deepcopy(model).float())
    pack_weights(model, rows=4)
    packed = logits(model)
    assert -90 < exact.min() < exact.max() < -70
    torch.testing.assert_close(packed, exact, atol=0.2, rtol=0)  # the hidden state is rounded to bfloat16
    plain_error, error = (a.log_softmax(-1) - exact.log_softmax(-1) for a in (plain, packed))
    assert error.abs().max() < 0.03 < 0.2 < plain_error.abs().max()
