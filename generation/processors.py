"""Processors: functions that change the scores of the next token before it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf

import torch
from torch import Tensor

from generation.options import GenerationOptions, Processor

BANNED = -inf  # the score of a token that must not be chosen


def penalize_repetition(ids: Tensor, scores: Tensor, penalty: float) -> Tensor:
    """Divide the positive scores of tokens that occur in ids by `penalty`, and multiply their negative scores by
    `penalty` (Keskar et al. 2019, CTRL, section 4.1)."""
    seen = _tokens_to_mask(ids, scores)
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def ban_repeated_ngrams(ids: Tensor, scores: Tensor, n: int) -> Tensor:
    """Ban each token that would complete an n-gram that the row already contains."""
    if ids.size(1) < n:
        return scores
    ngrams = ids.unfold(1, n, 1)  # (N, T - n + 1, n)
    # True for each n-gram whose first n - 1 tokens are the last n - 1 tokens of the row.
    repeats = (ngrams[:, :, :-1] == ids[:, None, ids.size(1) - n + 1 :]).all(dim=-1)
    return scores.masked_fill(_tokens_to_mask(ngrams[:, :, -1].masked_fill(~repeats, -1), scores), BANNED)


def ban_words(ids: Tensor, scores: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Ban each token that would complete one of `words`, which are sequences of token ids."""
    scores = scores.clone()
    for *start, last in words:
        if len(start) <= ids.size(1):
            ends_with_start = (ids[:, ids.size(1) - len(start) :] == ids.new_tensor(start)).all(dim=-1)
            scores[ends_with_start, last] = BANNED
    return scores


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Ban all tokens whose score is lower than the k-th highest score (Fan et al. 2018)."""
    return scores.masked_fill(scores < scores.topk(min(k, scores.size(1))).values[:, -1:], BANNED)


def keep_top_p(scores: Tensor, p: float, min_tokens_to_keep: int = 1) -> Tensor:
    """Keep the smallest set of most probable tokens whose probabilities sum to at least p, and ban the other tokens
    (nucleus sampling, Holtzman et al. 2020). The set has at least min_tokens_to_keep tokens. Probabilities are added in
    ascending order, so that the rounding is that of transformers."""
    ascending, order = scores.sort()
    banned = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    banned[:, -min_tokens_to_keep:] = False
    return scores.masked_fill(banned.scatter(1, order, banned), BANNED)


def keep_min_p(scores: Tensor, p: float, min_tokens_to_keep: int = 1) -> Tensor:
    """Ban tokens whose probability is less than p times that of the most probable token (Nguyen et al. 2024). The
    min_tokens_to_keep most probable tokens are never banned."""
    probabilities = scores.softmax(dim=-1)
    banned = probabilities < p * probabilities.amax(dim=-1, keepdim=True)
    most_probable = probabilities.topk(min(min_tokens_to_keep, scores.size(1))).indices
    return scores.masked_fill(banned.scatter(1, most_probable, False), BANNED)


def _tokens_to_mask(tokens: Tensor, scores: Tensor) -> Tensor:
    """Return (N, V) booleans. Row i is True at each id in row i of `tokens` (N, any length); the id -1 is ignored."""
    mask = torch.zeros(len(scores), scores.size(1) + 1, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, tokens.where(tokens >= 0, scores.size(1)), True)[:, :-1]


def make_processor(options: GenerationOptions, prompt_length: int, mask: Tensor | None) -> Processor:
    """Return one processor that calls all requested processors, one after the other, in the order of transformers.

    prompt_length includes padding. mask is (N, prompt + new tokens), 0 for padding, or None if no row is padded.
    """
    history_processors: list[Processor] = []
    if options.repetition_penalty != 1:
        history_processors.append(partial(penalize_repetition, penalty=options.repetition_penalty))
    if options.no_repeat_ngram_size:
        history_processors.append(partial(ban_repeated_ngrams, n=options.no_repeat_ngram_size))
    if words := [word for word in options.bad_words_ids or () if list(word) not in [[token] for token in options.eos]]:
        history_processors.append(partial(ban_words, words=words))

    custom = options.logits_processor or []
    custom = [custom] if callable(custom) else list(custom)
    warpers = make_warpers(options)

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        # Replace padding by -1, which is no token id, so that padding does not count as a token of the row.
        history = ids if mask is None or not history_processors else ids.masked_fill(mask[:, : ids.size(1)] == 0, -1)
        for processor in history_processors:
            scores = processor(history, scores)
        if ids.size(1) - prompt_length < options.min_new_tokens and options.eos:
            scores = scores.clone()
            # A loop: `scores[:, options.eos]` would copy the list to a GPU as a tensor, and the host would wait.
            for token in options.eos:
                scores[:, token] = BANNED
        for processor in custom:
            scores = processor(ids, scores)
        for warper in warpers:
            scores = warper(scores)
        return scores

    return process


def make_warpers(options: GenerationOptions) -> list[Callable[[Tensor], Tensor]]:
    """Return functions (N, V) -> (N, V) that change the sampling distribution, in the order of transformers."""
    warpers: list[Callable[[Tensor], Tensor]] = []
    # In beam search, keep more tokens than there are eos tokens, so that at least one kept token does not end the beam.
    min_tokens_to_keep = 1 if options.num_beams == 1 else max(2, 1 + len(options.eos))
    if options.temperature != 1:
        warpers.append(lambda scores: scores / options.temperature)
    if options.top_k:
        warpers.append(partial(keep_top_k, k=max(options.top_k, min_tokens_to_keep)))
    if options.top_p is not None and options.top_p < 1:
        warpers.append(partial(keep_top_p, p=options.top_p, min_tokens_to_keep=min_tokens_to_keep))
    if options.min_p:
        warpers.append(partial(keep_min_p, p=options.min_p, min_tokens_to_keep=min_tokens_to_keep))
    return warpers
