"""Log-probabilities of continuations given their contexts. All evaluation tasks except `loss` are computed from them.

A request is a context and a continuation. If several requests have the same context, a GPT reads the context only once:
a batch of contexts, padded on the left, fills a KV cache. The continuations are then scored with copies of the cache's
rows. Log-probabilities are computed in float32, and only at the positions of the continuations. The batches do not
depend on the number of processes, so neither do the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.loader import ceil_div
from data.tokenizer import Tokenizer
from kernels.argmax import argmax
from kernels.loss import centered_head
from pretrained import PADDING_LIMIT

SOFTMAX_ROWS = 128  # positions whose float32 logits are computed at a time: 26 MB with GPT-2's vocabulary


class Request(NamedTuple):
    """The token ids of a continuation to score, and of its context.

    A continuation at the start of a text has end-of-text as its context.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Scores(NamedTuple):
    """The scores of N requests."""

    log_probs: np.ndarray  # (N,) float64: log-probability summed over the tokens of the continuation, in nats
    greedy: np.ndarray  # (N,) bool: True if greedy decoding would produce exactly the continuation


# A function that scores requests, such as `log_likelihoods` with its other arguments bound, or `Evaluator.score`.
Scorer = Callable[[Sequence[Request]], Scores]


class _Part(NamedTuple):
    """The tokens of a continuation, or of one window of a continuation that is too long for the model."""

    tokens: tuple[int, ...]
    request: int  # index of the request that the tokens belong to


class _Batch(NamedTuple):
    """Contexts that go through the model together, and for each context the continuations to score after it."""

    contexts: list[tuple[int, ...]]
    parts: list[list[_Part]]

    def rows(self, batch_size: int) -> Iterator[list[tuple[int, _Part]]]:
        """Yield lists of at most `batch_size` pairs (index of context, part), sorted by length to reduce padding."""
        rows = [(i, part) for i, parts in enumerate(self.parts) for part in parts]
        rows.sort(key=lambda row: len(row[1].tokens))
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]

    def passes(self, batch_size: int) -> int:
        """Return the number of forward passes that a GPT needs for this batch."""
        return int(len(self.contexts[0]) > 1) + ceil_div(sum(map(len, self.parts)), batch_size)


def check_pair(model: Any, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the sizes of the vocabularies show that the tokenizer does not belong to the model."""
    found, expected = tokenizer.vocab_size, model.config.vocab_size
    if not 0 <= expected - found < getattr(model, "vocab_padding_limit", PADDING_LIMIT):
        raise ValueError(
            f"the tokenizer has {found:,} tokens and the model a vocabulary of {expected:,}: they do not belong "
            "together; name a directory that holds the model and its own tokenizer.json"
        )


@torch.no_grad()
def log_likelihoods(
    model: Any,
    requests: Sequence[Request],
    *,
    batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Any] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Scores:
    """Score every continuation given its context.

    If context and continuation together are longer than the model's block size, the context is cut on the left, as in
    lm-evaluation-harness. If the continuation alone is longer than the block size, it is scored in windows of half the
    block size. The context of each window is then as many of the preceding tokens as fit.

    Args:
        model: a GPT, or a module with `config.block_size`, `config.vocab_size` and a forward method that takes
            `input_ids` and `logits_to_keep`. If it has no `new_cache` method, the context is computed again for each
            continuation.
        batch_size: sequences per forward pass; None means 8 on CPU and 64 elsewhere. It changes the scores only by
            rounding errors.
        rank, world_size: this process computes every world_size-th batch, beginning with batch `rank`. All processes
            run the same number of forward passes, because FSDP requires this.
        reduce: sums a tensor over all ranks in place; required if world_size > 1.
        progress: called with the number of continuations, or windows of long continuations, that this process has
            scored since the previous call.

    Returns the scores of all requests on every rank.
    Raises ValueError with the index of a request that has an empty context or continuation, has a token id outside the
    vocabulary, or gets logits that are not finite.
    """
    if world_size > 1 and reduce is None:
        raise ValueError(f"{world_size} processes need the argument `reduce`, a function that sums a tensor over them")
    device = next(model.parameters()).device
    batch_size = batch_size or (8 if device.type == "cpu" else 64)
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    for i, request in enumerate(requests):
        if not request.context or not request.continuation:
            raise ValueError(f"request {i} has an empty {'continuation' if request.context else 'context'}")
        if max(max(request.context), max(request.continuation)) >= vocab_size:
            raise ValueError(
                f"request {i} has a token id outside the model's vocabulary of {vocab_size:,}: the tokenizer and the "
                "model do not belong together"
            )
    batches = _make_batches(requests, block_size, batch_size)
    # At the end, a rank with fewer forward passes than others runs additional passes, whose results are not used.
    passes = [sum(batch.passes(batch_size) for batch in batches[r::world_size]) for r in range(world_size)]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    # (2, requests): the log-probability of each continuation, and how many of its tokens are not the most likely ones.
    scores = torch.zeros(2, len(requests), dtype=dtype, device=device)
    with _eval_mode(model):
        head = _output_head(model)
        for batch in batches[rank::world_size]:
            for request_ids, log_probs, misses in _score(model, head, batch, batch_size):
                index = torch.tensor(request_ids, device=device)
                scores[0].index_add_(0, index, log_probs.to(dtype).sum(1))
                scores[1].index_add_(0, index, misses.to(dtype).sum(1))
                if progress is not None:
                    progress(len(request_ids))
        for _ in range(max(passes) - passes[rank]):
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
    if reduce is not None:
        reduce(scores)
    sums, misses_per_request = scores.cpu().numpy().astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(sums))
    if len(wrong):
        raise ValueError(
            f"the model's logits are not finite (NaN or infinite) for {len(wrong)} of {len(requests)} requests, "
            f"first for request {wrong[0]}: the weights are damaged, or values overflow in this dtype (try float32)"
        )
    return Scores(sums, misses_per_request == 0)


def _make_batches(requests: Sequence[Request], block_size: int, batch_size: int) -> list[_Batch]:
    groups: dict[tuple[int, ...], list[_Part]] = {}
    for i, (context, continuation) in enumerate(requests):
        step = len(continuation) if len(continuation) <= block_size else max(1, block_size // 2)
        for start in range(0, len(continuation), step):
            tokens = continuation[start : start + step]
            # The last token is predicted but not an input, so block_size + 1 tokens fit.
            before = (context + continuation[:start])[-(block_size + 1 - len(tokens)) :]
            groups.setdefault(before, []).append(_Part(tokens, i))
    batches: list[_Batch] = []
    longest = 0
    # The longest contexts come first, so that the first batch already fails if memory does not suffice.
    for context in sorted(groups, key=len, reverse=True):
        longest = max(longest, *(len(part.tokens) for part in groups[context]))
        full = not batches or len(batches[-1].contexts) == batch_size
        if full or len(batches[-1].contexts[0]) - 1 + longest > block_size:
            batches.append(_Batch([], []))
            longest = max(len(part.tokens) for part in groups[context])
        batches[-1].contexts.append(context)
        batches[-1].parts.append(groups[context])
    return batches


def _score(
    model: Any, head: Tensor | None, batch: _Batch, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Score the continuations of a batch, R of them in each forward pass. `head` is the result of `_output_head`.

    Yields for each of these passes the indices of the R requests, the log-probabilities of the tokens (R, T), 0 at
    padding, and a mask (R, T) that is True where the token of the continuation is not the most likely token.
    """
    device = next(model.parameters()).device
    # A GPT's first pass reads the contexts without their last tokens. The logits of a context's last token predict the
    # first token of the continuation, so the later passes read this last token together with the continuation.
    contexts, mask = _pad([context[:-1] for context in batch.contexts], device, left=True)  # (contexts, P)
    cache = None
    if head is not None and contexts.size(1):
        cache = model.new_cache(*contexts.shape)
        model(contexts, attention_mask=mask, cache=cache, return_logits=False)
    for rows in batch.rows(batch_size):
        context_of = torch.tensor([i for i, _ in rows], device=device)
        targets, valid = _pad([part.tokens for _, part in rows], device)  # (R, T)
        if head is not None:
            inputs, _ = _pad([(batch.contexts[i][-1], *part.tokens[:-1]) for i, part in rows], device)
            # In causal attention, no token attends to padding on its right, so padding on the right needs no mask.
            row_mask = torch.cat([mask[context_of], torch.ones_like(valid)], dim=1)  # (R, P + T)
            row_cache = None if cache is None else _copy_rows(model, cache, context_of, inputs.size(1))
            output = model(inputs, attention_mask=row_mask, cache=row_cache, return_logits=False)
            states_or_logits = output.last_hidden_state[valid].to(head.dtype)  # (tokens, C), before the output head
        else:
            # For other architectures, pad only on the right, which needs neither a mask nor position ids.
            lengths = torch.tensor([len(batch.contexts[i]) for i, _ in rows], device=device).unsqueeze(1)
            inputs, _ = _pad([batch.contexts[i] + part.tokens[:-1] for i, part in rows], device)
            first = int(lengths.min()) - 1
            offset = torch.arange(first, inputs.size(1), device=device) - (lengths - 1)
            scored = (offset >= 0) & (offset < valid.sum(dim=1, keepdim=True))
            states_or_logits = model(inputs, logits_to_keep=inputs.size(1) - first).logits[scored]  # (tokens, V)
        log_probs = torch.zeros(targets.shape, device=device)
        misses = torch.zeros_like(valid)
        log_prob, miss = [], []
        for x, target in zip(states_or_logits.split(SOFTMAX_ROWS), targets[valid].split(SOFTMAX_ROWS), strict=True):
            row_logits = (x if head is None else F.linear(x, head)).float()
            log_prob.append(-F.cross_entropy(row_logits, target, reduction="none"))
            miss.append(argmax(row_logits) != target)
        log_probs[valid], misses[valid] = torch.cat(log_prob), torch.cat(miss)
        yield [part.request for _, part in rows], log_probs, misses


def _output_head(model: Any) -> Tensor | None:
    """Return the output head of a GPT, (V, C), or None for other architectures.

    Its dtype is that of the matrix products: autocast's dtype if autocast is enabled, otherwise that of the weights.
    """
    if not hasattr(model, "new_cache"):
        return None
    weight = model.transformer.wte.weight.detach()
    if hasattr(weight, "full_tensor"):  # sharded by FSDP
        weight = weight.full_tensor()
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return centered_head(weight, dtype)


def _pad(sequences: list[tuple[int, ...]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return the ids padded with 0 (B, longest) and a mask (B, longest) that is False at padding."""
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    valid = torch.zeros(len(sequences), length, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if left else slice(len(sequence))
        ids[i, place] = torch.tensor(sequence, dtype=torch.long)
        valid[i, place] = True
    return ids.to(device), valid.to(device)


def _copy_rows(model: Any, cache: Any, rows: Tensor, extra: int) -> Any:
    """Return a new cache that holds the given rows (R,) of `cache` and has room for `extra` more tokens."""
    copy = model.new_cache(len(rows), cache.length + extra)
    for new, old in zip(copy.keys + copy.values, cache.keys + cache.values, strict=True):
        new[:, :, : cache.length] = old.index_select(0, rows)
    copy.length = cache.length
    return copy


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
