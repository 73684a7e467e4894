"""Perplexity with sliding windows against scoring one token at a time, and the detokenizers."""

import functools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eval.detokenizers import detokenize_ptb, detokenize_wikitext
from eval.likelihood import log_likelihoods
from eval.perplexity import CORPORA, Perplexity, SlidingWindows, perplexity, perplexity_metrics, read_text
from model import GPT, GPTConfig

BLOCK, EOT = 16, 50


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=51, block_size=BLOCK, n_layer=2, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 50, 75).tolist()


@torch.no_grad()
def naive(model, tokens):
    """Score each token given as many tokens before it as fit; end-of-text precedes the first."""
    sequence = [EOT, *tokens]
    nats = 0.0
    for i in range(1, len(sequence)):
        logits = model(torch.tensor([sequence[max(0, i - BLOCK) : i]])).logits[0, -1]
        nats -= float(F.log_softmax(logits.double(), dim=-1)[sequence[i]])
    return nats


def test_stride_one_matches_the_naive_perplexity(model, tokens):
    result = perplexity(tokens, EOT, BLOCK, 1, functools.partial(log_likelihoods, model))
    assert result.tokens == 75
    assert math.exp(result.nats / 75) == pytest.approx(math.exp(naive(model, tokens) / 75), rel=1e-5)
    # A text that is shorter than the block size.
    result = perplexity(tokens[:7], EOT, BLOCK, 1, functools.partial(log_likelihoods, model))
    assert result.nats == pytest.approx(naive(model, tokens[:7]), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_every_token_is_scored_once_with_the_longest_context_that_fits(tokens, stride):
    windows = SlidingWindows(tokens, EOT, BLOCK, stride)
    requests = list(windows)
    assert len(windows) == len(requests)
    assert windows[2:4] == requests[2:4]
    assert [token for request in requests for token in request.continuation] == tokens
    end = 0
    for request in requests:
        before = [EOT, *tokens][: end + 1]
        assert list(request.context) == before[-(BLOCK + 1 - len(request.continuation)) :]
        end += len(request.continuation)


def test_metrics_are_weighted_by_tokens(model, tokens):
    score = functools.partial(log_likelihoods, model)
    result = perplexity(tokens, EOT, BLOCK, 8, score)
    assert result.window_tokens.tolist() == [8] * 9 + [3]  # the last window is shorter
    metrics = perplexity_metrics(result, n_bytes=300, n_words=60)
    assert metrics["perplexity"][0] == pytest.approx(math.exp(result.nats / 75))
    assert metrics["bits_per_byte"][0] == pytest.approx(result.nats / math.log(2) / 300)
    assert metrics["word_perplexity"][0] == pytest.approx(math.exp(result.nats / 60))
    # If all windows have the same length, the standard error is that of their mean.
    even = perplexity(tokens[:72], EOT, BLOCK, 8, score)
    expected = even.window_nats.std(ddof=1) / 3 / 8
    assert even.normalized(72)[1] == pytest.approx(expected)
    assert set(perplexity_metrics(result, 300, 0)) == {"perplexity", "bits_per_byte"}


def test_a_perplexity_per_word_that_is_too_large_for_a_float_is_left_out():
    windows = np.array([800.0, 1200.0])
    result = Perplexity(2000.0, 400, windows, np.array([200, 200]))
    assert set(perplexity_metrics(result, 900, 2)) == {"perplexity", "bits_per_byte"}
    assert all(math.isfinite(number) for pair in perplexity_metrics(result, 900, 3).values() for number in pair)


def test_invalid_texts_and_strides_are_refused(model, tmp_path):
    score = functools.partial(log_likelihoods, model)
    with pytest.raises(ValueError, match="the text is empty"):
        perplexity([], EOT, BLOCK, 4, score)
    with pytest.raises(ValueError, match=r"stride 17: expected 1\.\.16"):
        perplexity([1], EOT, BLOCK, 17, score)
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        read_text(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 .* at byte 3"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(OSError, match=r"cannot read .*none\.txt: No such file"):
        read_text(tmp_path / "none.txt")


def test_wikitext_is_detokenized():
    raw = (
        " = Robert Boulter = \n \n Robert Boulter is a film , television and theatre actor . He had a guest @-@"
        ' starring role in 2000 , for 1 @,@ 000 pounds ( about $ 1 @.@ 5 million ) . It \'s called " Herons " .\n'
    )
    assert detokenize_wikitext(raw) == (
        "= Robert Boulter =\n\nRobert Boulter is a film, television and theatre actor. He had a guest-starring"
        ' role in 2000, for 1,000 pounds (about $ 1.5 million). It\'s called "Herons".\n'
    )


def test_the_penn_treebank_is_detokenized():
    raw = " the company 's shares did n't rise to $ N a share \n -LRB- it said -RRB- `` so what '' \n"
    assert detokenize_ptb(raw) == "the company's shares didn't rise to $N a share\n(it said) \"so what\"\n"


def test_corpora_have_a_source_and_a_detokenizer():
    for corpus in CORPORA.values():
        assert "/" in corpus.hub[0]
        assert isinstance(corpus.detokenize("a b"), str)
