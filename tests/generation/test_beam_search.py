"""Test beam search against transformers, token by token."""

import itertools

import pytest
import torch

from generation import generate
from tests.generation.twins import SHAPES, assert_varied, both, make_pair, ragged_batch, walk

BEAM_SETTINGS = list(itertools.product((0.6, 1.0, 2.0), (False, True)))  # length penalty, early stopping


def check_beams(pair, vocab_size, num_beams, length_penalty, early_stopping):
    ids, mask = ragged_batch(vocab_size)
    options = walk(vocab_size) | {"num_beams": num_beams, "length_penalty": length_penalty}
    ours, theirs = both(pair, ids, mask, **options, early_stopping=early_stopping)
    assert torch.equal(ours, theirs)
    assert_varied(ours)
    greedy = generate(pair[1], ids, attention_mask=mask, **walk(vocab_size))
    width = min(ours.size(1), greedy.size(1))
    assert (ours[:, :width] != greedy[:, :width]).any(dim=1).sum() >= 2, "the beams found only the greedy text"


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_beams_equal_transformers(pair_of, number):
    """With 2 or 4 beams. The slow test below covers all settings, and 8 beams."""
    shape, num_beams = SHAPES[number], 2 + 2 * (number % 2)
    setting = BEAM_SETTINGS[number // 2]
    check_beams(pair_of(shape), shape[0], num_beams, *setting)


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_beams_equal_transformers_in_every_setting(pair_of, shape, num_beams):
    for setting in BEAM_SETTINGS:
        check_beams(pair_of(shape), shape[0], num_beams, *setting)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 2.0])
def test_beams_that_end_early_equal_transformers(pair, length_penalty, early_stopping):
    """Compare several results of different lengths with their scores."""
    theirs, ours = pair
    ids, mask = ragged_batch(257)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "eos_token_id": list(range(0, 257, 5)),
        "num_beams": 4,
        "num_return_sequences": 3,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        "output_scores": True,
    }
    expected = theirs.generate(ids, pad_token_id=0, return_dict_in_generate=True, do_sample=False, **options)
    output = generate(ours, ids, return_dict=True, **options)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores)
    assert torch.equal(output.beam_indices, expected.beam_indices.long())
    transitions = theirs.compute_transition_scores(expected.sequences, expected.scores, expected.beam_indices)
    torch.testing.assert_close(output.logprobs, transitions, atol=1e-4, rtol=1e-4)
    assert output.lengths.tolist() == (expected.beam_indices >= 0).sum(dim=1).tolist()


def test_the_vocabulary_may_be_smaller_than_the_number_of_candidates(tmp_path):
    _, model = make_pair((2, 16, 1, 1, 8), tmp_path)
    for options in ({"top_k": 1}, {"min_p": 0.5}):
        out = generate(
            model,
            [[1]],
            max_new_tokens=4,
            num_beams=2,
            do_sample=True,
            eos_token_id=[0, 1],
            early_stopping=True,
            **options,
        )
        assert out.size(1) > 1
