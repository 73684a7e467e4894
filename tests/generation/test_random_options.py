"""Random combinations of options give the tokens of transformers' `generate`, with the same float32 weights."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tests.generation.twins import SHAPES, both

SHAPE = SHAPES[1]
VOCAB = SHAPE[0]
ids = st.integers(0, VOCAB - 1)
OPTIONS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 24)},
    optional={
        "num_beams": st.integers(2, 5),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3, 2.0]),
        "no_repeat_ngram_size": st.integers(0, 4),
        "min_new_tokens": st.integers(0, 12),
        # Many end tokens, so that rows end at different lengths.
        "eos_token_id": ids | st.lists(ids, min_size=1, max_size=30, unique=True),
        "bad_words_ids": st.lists(st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=20),
    },
)
BEAM_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "length_penalty": st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0]),
        "early_stopping": st.sampled_from([True, False, "never"]),
        "num_return_sequences": st.integers(1, 5),
    },
)


def draw_prompts(data):
    """Return ids and mask (rows, T) of up to four prompts of up to nine tokens, padded on the left."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4), label="lengths")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    longest = max(lengths)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return torch.randint(VOCAB, mask.shape, generator=generator) * mask, mask


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_random_options_give_the_tokens_of_transformers(pair, data):
    prompts, mask = draw_prompts(data)
    options = data.draw(OPTIONS, label="options")
    if "num_beams" in options:
        options |= data.draw(BEAM_OPTIONS, label="beam options")
        options["num_return_sequences"] = min(options.get("num_return_sequences", 1), options["num_beams"])
    # transformers asks for the minimum to be within the maximum; with no end token there is nothing to ban.
    if "min_new_tokens" in options:
        options["min_new_tokens"] = min(options["min_new_tokens"], options["max_new_tokens"])
    ours, theirs = both(pair, prompts, mask, **options)
    assert torch.equal(ours, theirs)
