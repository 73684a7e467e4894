"""LAMBADA: all tokens of the last word are scored."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eval.lambada import lambada_metrics, passage_texts, read_passages, score_last_words
from eval.likelihood import Scores, log_likelihoods
from model import GPT, GPTConfig


def test_the_wheel_has_all_passages():
    texts = read_passages()
    assert len(texts) == 5153
    assert texts[0].endswith("I don't care about signs")


@torch.no_grad()
def test_all_tokens_of_a_word_are_scored(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=32)).eval()
    words = ["mat", "antidisestablishmentarianism"]
    texts = [f"The cat sat on the {word}" for word in words]
    lengths = [len(tokenizer.encode(" " + word)) for word in words]
    assert lengths[0] == 1 < 3 < lengths[1]
    result = score_last_words(texts, tokenizer, functools.partial(log_likelihoods, model))
    for text, n, found in zip(texts, lengths, result.log_probs, strict=True):
        ids = torch.tensor(tokenizer.encode(text))
        log_probs = F.log_softmax(model(ids[None, :-1]).logits[0], dim=-1)
        expected = log_probs.gather(1, ids[1:, None])[-n:].sum()
        assert found == pytest.approx(float(expected), rel=1e-5)
    metrics = lambada_metrics(result)
    assert metrics["perplexity"][0] == pytest.approx(math.exp(-result.log_probs.mean()))  # per word, not per token


@torch.no_grad()
def test_a_word_is_correct_only_if_every_token_is_the_most_likely(tokenizer):
    # A model that continues a fixed sequence: it predicts all tokens of the long word except the last.
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
    result = score_last_words([whole, known], tokenizer, functools.partial(log_likelihoods, Repeats()))
    assert len(tokenizer.encode(known)) == len(ids) - 1
    assert result.correct.tolist() == [False, True]
    assert lambada_metrics(result)["acc"] == (0.5, pytest.approx(0.5))


def test_errors_name_the_number_of_a_row_without_text(tokenizer):
    assert passage_texts([{"text": "two words"}]) == ["two words"]
    with pytest.raises(ValueError, match="lambada, row 2: expected a 'text' of several words; the row has txt"):
        passage_texts([{"text": "two words"}, {"txt": "x"}])
    with pytest.raises(ValueError, match="the data has no passages"):
        score_last_words([], tokenizer, lambda requests: Scores(np.zeros(0), np.zeros(0, bool)))
