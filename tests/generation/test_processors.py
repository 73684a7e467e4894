"""Test the changes to the scores of the next token against transformers."""

import itertools

import pytest
import torch
import transformers
from torch import Generator

from generation import generate
from tests.generation.twins import both, ragged_batch, their_filter

FILTERS = [
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.7},
    {"top_p": 0.01},
    {"min_p": 0.1},
    {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.7, "top_p": 0.95},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filtered_scores_equal_transformers_processors(pair, options):
    ids, mask = ragged_batch(257)
    output = generate(
        pair[1],
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=True,
        generator=Generator().manual_seed(0),
        return_dict=True,
        output_logits=True,
        output_scores=True,
        **options,
    )
    for logits, scores, tokens in zip(output.logits, output.scores, output.sequences[:, 9:].T, strict=True):
        expected = their_filter(**options)(None, logits)
        assert torch.equal(scores.isinf(), expected.isinf())
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
        assert scores.gather(1, tokens[:, None]).isfinite().all()
        if options == {"top_p": 0.01} or options == {"top_k": 1}:  # the token that reaches p is kept
            assert torch.equal(tokens, logits.argmax(dim=-1))


def test_top_k_of_none_or_zero_keeps_all_tokens(pair):
    options = {"max_new_tokens": 20, "do_sample": True}
    for top_k in (None, 0):
        drawn = generate(pair[1], [[1, 2]], top_k=top_k, generator=Generator().manual_seed(5), **options)
        assert torch.equal(drawn, generate(pair[1], [[1, 2]], generator=Generator().manual_seed(5), **options))


def test_top_k_above_the_vocabulary_size_keeps_all_tokens(pair):
    def sample(top_k):
        generator = Generator().manual_seed(3)
        return generate(pair[1], [[1, 2]], max_new_tokens=8, do_sample=True, top_k=top_k, generator=generator)

    assert torch.equal(sample(10_000), sample(None))


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words_ids": [[3], [9, 5], [200, 201, 7]]},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2, "num_beams": 3},
        {"bad_words_ids": [[k] for k in range(100)], "num_beams": 2},
        {"eos_token_id": list(range(0, 257, 12)), "min_new_tokens": 10},
    ],
    ids=str,
)
def test_penalties_and_bans_equal_transformers(pair, options):
    ids, mask = ragged_batch(257)
    ours, theirs = both(pair, ids, mask, max_new_tokens=40, **options)
    assert torch.equal(ours, theirs)
    free = generate(pair[1], ids, attention_mask=mask, max_new_tokens=40)
    assert not torch.equal(ours, free[:, : ours.size(1)]), "the option had no effect"


def test_a_logits_processor_is_called_as_in_transformers(pair):
    class Odd(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert input_ids.shape == (2, next(lengths))
            return scores.index_fill(1, torch.arange(0, 257, 2), float("-inf"))

    lengths = itertools.chain(range(3, 13), range(3, 13))
    options = {"max_new_tokens": 10, "logits_processor": transformers.LogitsProcessorList([Odd()])}
    ours, theirs = both(pair, torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.long), **options)
    assert torch.equal(ours, theirs)
    assert (ours[:, 3:] % 2 == 1).all()
