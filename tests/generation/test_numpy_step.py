"""Test that a step in NumPy chooses the tokens of the plain loop, and when it is used."""

import copy

import pytest
import torch
from torch import Generator, nn
from torch.testing._internal.two_tensor import TwoTensor

import generation.forward
from generation import generate, pack_weights
from generation.forward import uses_numpy_step
from generation.numpy_step import NumpyStep
from generation.options import GenerationOptions
from generation.packed import PackedLinear
from model import GPT, GPTConfig
from tests.generation.twins import SHAPES, both, walk

ONE = GenerationOptions(max_new_tokens=8)


@pytest.fixture
def steps(monkeypatch):
    """Return a list that grows with each call of a NumpyStep."""
    counted = []
    step = NumpyStep.__call__
    monkeypatch.setattr(NumpyStep, "__call__", lambda self, tokens: (counted.append(1), step(self, tokens))[1])
    return counted


def two_ways(monkeypatch, steps, run):
    """Return what `run` returns with a NumpyStep, and what it returns in the plain loop."""
    found = run()
    assert len(steps) > 10
    with monkeypatch.context() as patch:
        patch.setattr(generation.forward, "uses_numpy_step", lambda *arguments: False)
        count = len(steps)
        expected = run()
        assert len(steps) == count
    return found, expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampled", [False, True])
def test_tokens_and_logits_equal_those_of_the_plain_loop(pair_of, monkeypatch, steps, shape, sampled):
    model = pair_of(shape)[1]
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.95} if sampled else {"repetition_penalty": 1.3}
    ids = torch.arange(9)[None]

    def run():
        generator = {"generator": Generator().manual_seed(5)} if sampled else {}
        return generate(model, ids, **walk(shape[0]), **options, **generator, return_dict=True, output_logits=True)

    found, expected = two_ways(monkeypatch, steps, run)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=1e-3, rtol=1e-4)


def test_tokens_equal_those_of_transformers(pair, steps):
    ids = torch.tensor([[5, 6, 7]])
    found, expected = both(pair, ids, torch.ones_like(ids), max_new_tokens=60)
    assert torch.equal(found, expected)
    assert len(steps) == 59


def test_prompts_of_one_token_the_last_position_and_beyond(pair, monkeypatch, steps):
    def run():
        long = generate(pair[1], [[3]], max_new_tokens=96)
        return torch.cat([long, generate(pair[1], [[3] * 80], max_new_tokens=60, sliding=True)], dim=1)

    found, expected = two_ways(monkeypatch, steps, run)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_variants_of_the_mlp_and_of_layer_norm(monkeypatch, steps, activation):
    torch.manual_seed(0)
    config = GPTConfig(61, 32, 2, 2, 16, n_inner=24, activation=activation, layer_norm_epsilon=0.1)
    model = GPT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    options = {"max_new_tokens": 29, "return_dict": True, "output_logits": True}
    found, expected = two_ways(monkeypatch, steps, lambda: generate(model, [[1, 2, 3]], **options))
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=1e-3, rtol=1e-4)


def test_a_change_of_the_weights_has_an_effect(pair):
    model = copy.deepcopy(pair[1])
    before = generate(model, [[1, 2, 3]], max_new_tokens=20)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(-1)
    assert not torch.equal(generate(model, [[1, 2, 3]], max_new_tokens=20), before)


def test_one_row_in_float32_needs_no_packed_weights(pair, steps):
    model = copy.deepcopy(pair[1])
    expected = generate(model, [[1, 2, 3]], max_new_tokens=20)
    pack_weights(model, rows=1)
    assert model.state_dict().keys() == pair[1].state_dict().keys()
    assert torch.equal(generate(model, [[1, 2, 3]], max_new_tokens=20), expected)
    assert len(steps) == 38


class Adapter(nn.Linear):
    """Stands in for a layer that another library puts in the place of a linear layer."""


def test_it_is_used_only_where_it_computes_what_the_model_does(pair):
    model = pair[1]
    assert uses_numpy_step(model, 1, None, ONE)
    assert not uses_numpy_step(model, 2, None, ONE)
    assert not uses_numpy_step(model, 1, torch.ones(1, 9), ONE)
    for output in ("output_hidden_states", "output_attentions"):
        options = GenerationOptions(max_new_tokens=8, return_dict=True, **{output: True})
        assert not uses_numpy_step(model, 1, None, options)
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_numpy_step(model, 1, None, ONE)
    changed = copy.deepcopy(model)
    assert uses_numpy_step(changed, 1, None, ONE)
    handle = changed.transformer.h[0].register_forward_hook(lambda *arguments: None)
    assert not uses_numpy_step(changed, 1, None, ONE)
    handle.remove()
    assert not uses_numpy_step(changed.train(), 1, None, ONE)
    changed.eval().transformer.h[1].mlp.c_fc = Adapter(32, 128)
    assert not uses_numpy_step(changed, 1, None, ONE)
    assert not uses_numpy_step(copy.deepcopy(model).bfloat16(), 1, None, ONE)
    assert not uses_numpy_step(GPT(GPTConfig(61, 32, 1, 2, 16, attention="window")).eval(), 1, None, ONE)
    packed = copy.deepcopy(model)
    packed.transformer.h[0].mlp.c_fc = PackedLinear(torch.zeros(128, 32), None)
    assert not uses_numpy_step(packed, 1, None, ONE)
    packed = copy.deepcopy(model)
    pack_weights(packed, rows=2)
    assert not uses_numpy_step(packed, 1, None, ONE)
    for change in (
        lambda block: block.mlp.train(),
        lambda block: setattr(block.mlp, "forward", lambda x: x),
        lambda block: setattr(block.mlp.c_fc, "bias", None),
        lambda block: setattr(
            block.mlp.c_fc, "weight", nn.Parameter(TwoTensor(torch.ones(128, 32), torch.ones(128, 32)))
        ),
    ):
        changed = copy.deepcopy(model)
        change(changed.transformer.h[1])
        assert not uses_numpy_step(changed, 1, None, ONE)


@pytest.mark.parametrize("row", [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]])
def test_torch_has_one_thread_while_a_single_row_chooses_its_token(pair, row):
    counts = []

    def count(ids, scores):
        counts.append(torch.get_num_threads())
        return scores if len(counts) < 5 else scores.fill_(-torch.inf)

    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="no token is left"):
            generate(pair[1], row, max_new_tokens=20, logits_processor=count)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert counts == [1 if len(row) == 1 else 3] * 5


def test_the_number_of_threads_is_kept_when_two_threads_decode(pair):
    def nested(ids, scores):
        generate(pair[1], [[4, 5]], max_new_tokens=3)  # as another thread would, while this one chooses its token
        return scores

    torch.set_num_threads(3)
    try:
        generate(pair[1], [[1, 2, 3]], max_new_tokens=3, logits_processor=nested)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
