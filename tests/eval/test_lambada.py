"""LAMBADA: the whole of the last word, however many tokens it has."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eval.lambada import guess_last_words, passages, read_passages, summarize
from eval.likelihood import Scores, log_likelihoods
from model import GPT, GPTConfig


def test_the_passages_are_all_there():
    texts = read_passages()
    assert len(texts) == 5153
    assert texts[0].endswith("I don't care about signs")


@torch.no_grad()
def test_a_word_of_several_tokens_counts_as_a_whole(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=32)).eval()
    words = ["mat", "antidisestablishmentarianism"]
    texts = [f"The cat sat on the {word}" for word in words]
    lengths = [len(tokenizer.encode(" " + word)) for word in words]
    assert lengths[0] == 1 < 3 < lengths[1]
    result = guess_last_words(texts, tokenizer, functools.partial(log_likelihoods, model))
    for text, n, found in zip(texts, lengths, result.log_probs, strict=True):
        ids = torch.tensor(tokenizer.encode(text))
        log_probs = F.log_softmax(model(ids[None, :-1]).logits[0], dim=-1)
        expected = log_probs.gather(1, ids[1:, None])[-n:].sum()
        assert found == pytest.approx(float(expected), rel=1e-5)
    figures = summarize(result)
    assert figures["perplexity"][0] == pytest.approx(math.exp(-result.log_probs.mean()))  # by word, not by token


@torch.no_grad()
def test_every_token_has_to_be_the_likeliest(tokenizer):
    # a model that repeats a fixed sequence: it knows the first tokens of the long word and not its last
    ids = tokenizer.encode("The antidisestablishmentarianism")
    continuation = dict(itertools.pairwise(ids[:-1]))

    class Repeats(torch.nn.Module):
        config = GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=4)

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, logits_to_keep=0):
            logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
            for row, column in np.ndindex(*input_ids.shape):
                logits[row, column, continuation.get(int(input_ids[row, column]), 0)] = 9.0
            return type("Output", (), {"logits": logits[:, -logits_to_keep:]})

    whole = "The antidisestablishmentarianism"
    known = tokenizer.decode(ids[:-1])
    result = guess_last_words([whole, known], tokenizer, functools.partial(log_likelihoods, Repeats()))
    assert len(tokenizer.encode(known)) == len(ids) - 1
    assert result.correct.tolist() == [False, True]
    assert summarize(result)["acc"] == (0.5, pytest.approx(0.5))


def test_rows_without_text_are_named(tokenizer):
    assert passages([{"text": "two words"}]) == ["two words"]
    with pytest.raises(ValueError, match="lambada, row 2: expected a 'text' of several words, it has txt"):
        passages([{"text": "two words"}, {"txt": "x"}])
    with pytest.raises(ValueError, match="there are no passages"):
        guess_last_words([], tokenizer, lambda requests: Scores(np.zeros(0), np.zeros(0, bool)))
