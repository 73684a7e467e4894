"""Checkpoints for the tests of other programs. docs/interoperability.md says how to install these programs."""

from pathlib import Path

import pytest
import torch

from data.tokenizer import train_tokenizer
from model import GPT, GPTConfig
from tests.conftest import VERSES

KINDS = ("gpt2", "bpe:400", "char")
PROMPT = "The forest of Arden"
DOCUMENT = Path(__file__).parents[2] / "docs" / "interoperability.md"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(kind)`: the directory of a model with random weights and a tokenizer of this kind."""
    made = {}

    def get(kind):
        if kind not in made:
            tokenizer = train_tokenizer(kind, VERSES)
            torch.manual_seed(0)
            config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=3, n_head=4, n_embd=64)
            model = GPT(config).eval()
            with torch.no_grad():  # large weights, so that greedy text does not repeat one token
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
            made[kind] = tmp_path_factory.mktemp("model")
            model.save_pretrained(made[kind], eos_token_id=tokenizer.eot)
            tokenizer.save(made[kind], model_max_length=64)
        return made[kind]

    return get


@pytest.fixture
def largest_difference(request):
    """`largest_difference(ours, theirs)`: assert that the values are equal to 1e-4, and print the difference."""

    def compare(ours, theirs, limit=1e-4):
        difference = (ours.double() - theirs.double()).abs().max().item()
        print(f"\n{request.node.name}: largest difference {difference:.1e} of values up to {ours.abs().max():.3g}")
        assert difference < limit
        assert ours.std() > 0.1, "nearly equal logits would be compared"

    return compare
