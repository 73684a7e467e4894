"""Fixtures of the tests of decoding: models with random weights."""

import pytest
import torch
import transformers

from model import GPT, GPTConfig
from tests.generation.twins import GPT2_124M, SHAPES, make_pair

transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory):
    """`pair_of(shape)`: a transformers GPT-2 of this shape and our copy of it."""
    made = {}

    def get(shape):
        if shape not in made:
            made[shape] = make_pair(shape, tmp_path_factory.mktemp("gpt2"), seed=[*SHAPES, GPT2_124M].index(shape))
        return made[shape]

    return get


@pytest.fixture(scope="session")
def pair(pair_of):
    """Return a small transformers GPT-2, with a vocabulary of 257, and our copy of it."""
    return pair_of(SHAPES[1])


@pytest.fixture(scope="session")
def uncertain():
    """Return a small model with 40 tokens, all of which have a similar probability."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, block_size=16, n_layer=1, n_head=1, n_embd=8)).eval()
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.3)
    return model
