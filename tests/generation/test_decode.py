"""Test `generate` against transformers, token by token, with the same float32 weights."""

import copy
from collections import Counter

import pytest
import torch
from torch import Generator

from generation import generate
from tests.generation.twins import GPT2_124M, SHAPES, assert_varied, both, make_pair, ragged_batch, walk


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}], ids=str)
def test_greedy_equals_transformers(pair_of, shape, options):
    ids, mask = ragged_batch(shape[0])
    ours, theirs = both(pair_of(shape), ids, mask, **walk(shape[0]), **options)
    assert torch.equal(ours, theirs)
    assert_varied(ours)


@pytest.mark.slow
def test_124m_equals_transformers(pair_of):
    pair = pair_of(GPT2_124M)
    ids, mask = ragged_batch(50257)
    for options in ({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}):
        ours, theirs = both(pair, ids, mask, max_new_tokens=28, **options)
        assert torch.equal(ours, theirs)
        assert_varied(ours)
    greedy = generate(pair[1], ids, attention_mask=mask, max_new_tokens=28)
    for num_beams, length_penalty, early_stopping in ((2, 0.6, False), (4, 1.0, True), (8, 2.0, False)):
        options = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
        ours, theirs = both(pair, ids, mask, max_new_tokens=28, eos_token_id=11, **options)
        assert torch.equal(ours, theirs)
        assert_varied(ours)
        assert (ours != greedy[:, : ours.size(1)]).any(dim=1).sum() >= 2


def test_outputs_equal_transformers(pair):
    theirs, ours = pair
    ids, mask = ragged_batch(257)
    outputs = dict.fromkeys(("output_logits", "output_scores", "output_hidden_states", "output_attentions"), True)
    options = {"attention_mask": mask, "max_new_tokens": 6, "repetition_penalty": 1.5} | outputs
    theirs.set_attn_implementation("eager")
    expected = theirs.generate(ids, pad_token_id=0, return_dict_in_generate=True, do_sample=False, **options)
    theirs.set_attn_implementation("sdpa")
    output = generate(ours, ids, return_dict=True, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert not torch.equal(output.logits[1], output.scores[1])
    for name in ("logits", "scores"):
        for mine, other in zip(getattr(output, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)
    for name in ("hidden_states", "attentions"):
        for step, other_step in zip(getattr(output, name), getattr(expected, name), strict=True):
            for mine, other in zip(step, other_step, strict=True):
                if mine.size(-2) > 1:  # the prompt's step: values at padding are arbitrary
                    mine, other = mine[..., -1:, :], other[..., -1:, :]
                torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    expected_logprobs = torch.stack([logits.log_softmax(-1) for logits in expected.logits], dim=1)
    chosen = expected_logprobs.gather(2, expected.sequences[:, 9:, None])[:, :, 0]
    torch.testing.assert_close(output.logprobs, chosen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.sequences_scores, chosen.mean(dim=1), atol=1e-4, rtol=1e-4)


def test_outputs_that_were_not_requested_are_none(pair):
    output = generate(pair[1], [[1, 2]], max_new_tokens=3, return_dict=True)
    assert (output.logits, output.scores, output.hidden_states, output.attentions) == (None,) * 4


def test_greedy_equals_a_forward_pass_over_all_tokens_at_each_step(pair):
    model = pair[1]
    ids = torch.tensor([[7, 8, 9], [30, 20, 10]])
    expected = ids
    for _ in range(40):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(generate(model, ids, max_new_tokens=40), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize(("prompt_length", "new"), [(96, 1), (90, 7)])
def test_the_last_new_token_may_lie_beyond_block_size(pair, prompt_length, new, options):
    """The model never reads it. transformers generates as many tokens."""
    ids = torch.randint(257, (2, prompt_length), generator=Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found, expected = both(pair, ids, mask, max_new_tokens=new, **options)
    assert found.shape == (2, 97)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=rf"{prompt_length} prompt tokens \+ {new + 1} new > block_size 96 \+ 1"):
        generate(pair[1], ids, max_new_tokens=new + 1, **options)


def test_beyond_block_size_the_model_sees_the_last_block_size_tokens(pair):
    model = pair[1]
    expected = torch.randint(257, (2, 90), generator=Generator().manual_seed(1))
    prompt = expected
    for _ in range(20):
        seen = expected[:, -model.config.block_size :]
        expected = torch.cat((expected, model(seen).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(generate(model, prompt, max_new_tokens=20, sliding=True), expected)
    with pytest.raises(ValueError, match=r"90 prompt tokens \+ 20 new > block_size 96"):
        generate(model, prompt, max_new_tokens=20)


def test_rows_that_have_ended_are_filled_with_eos(pair):
    ids = torch.arange(40)[:, None] + 100
    output = generate(pair[1], ids, max_new_tokens=30, eos_token_id=[17, 3, 99], return_dict=True)
    assert len(Counter(output.lengths.tolist())) > 3, "rows should end at different lengths"
    for row, length, logprobs in zip(output.sequences[:, 1:].tolist(), output.lengths, output.logprobs, strict=True):
        assert not {17, 3, 99} & set(row[: length - 1])
        assert set(row[length:]) <= {17}
        assert (logprobs[:length] < 0).all()
        assert (logprobs[length:] == 0).all()


@pytest.mark.parametrize("num_beams", [1, 2])
def test_damaged_weights_are_refused(tmp_path, num_beams):
    _, model = make_pair(SHAPES[2], tmp_path)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="weights are damaged"):
        generate(model, [[1, 2]], max_new_tokens=3, num_beams=num_beams)


def test_damaged_weights_are_refused_with_a_prompt_beyond_block_size(pair):
    model = copy.deepcopy(pair[1])
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are NaN"):
        generate(model, [[1] * 100], max_new_tokens=2, sliding=True)


def test_generate_keeps_the_gradient_mode(pair):
    assert generate(pair[1], [[1]], max_new_tokens=2).is_inference() is False
    assert torch.is_grad_enabled()
