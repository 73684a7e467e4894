"""Log-probabilities of texts after their contexts: what every evaluation here comes down to.

Requests that share a context compute it once: their contexts go through the model as one batch, padded on the left,
and the endings follow on copies of its keys and values. Log-probabilities are taken in fp32, at the endings' positions
only. How requests fall into batches depends on the requests and the batch size alone, so any number of processes
computes the same numbers.
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
from kernels.loss import centered_head

SOFTMAX_ROWS = 128  # rows of logits in fp32 at a time: 26 MB for GPT-2's vocabulary
PADDING_LIMIT = 128  # a vocabulary is padded to a multiple of 64 or 128 for speed, never by more


class Request(NamedTuple):
    """The ids of an ending to be scored and of what stands before it, which is end-of-text where nothing does."""

    context: tuple[int, ...]
    ending: tuple[int, ...]


class Scores(NamedTuple):
    """What a model makes of N requests."""

    log_probs: np.ndarray  # (N,) float64: the sum over each ending's tokens, in nats
    greedy: np.ndarray  # (N,) bool: each token of the ending is the model's most likely one


# A model, a batch size and a share of the work bound to `log_likelihoods`: all that a task needs to know of a model.
Scorer = Callable[[Sequence[Request]], Scores]


class _Part(NamedTuple):
    """An ending, or a piece of one longer than half the model's context, and which request it belongs to."""

    ending: tuple[int, ...]
    request: int


class _Batch(NamedTuple):
    """Contexts that go through the model together, and the endings that follow each."""

    contexts: list[tuple[int, ...]]
    parts: list[list[_Part]]

    def rows(self, batch_size: int) -> Iterator[list[tuple[int, _Part]]]:
        """(index of the context, ending) in groups of at most `batch_size`, of like length to save padding."""
        rows = [(owner, part) for owner, parts in enumerate(self.parts) for part in parts]
        rows.sort(key=lambda row: len(row[1].ending))
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]

    def passes(self, batch_size: int) -> int:
        """How often it calls the model."""
        return int(len(self.contexts[0]) > 1) + ceil_div(sum(map(len, self.parts)), batch_size)


def check_pair(model: Any, tokenizer: Tokenizer) -> None:
    """Raise ValueError when the tokenizer cannot be the one the model was trained with."""
    found, expected = tokenizer.vocab_size, model.config.vocab_size
    if not 0 <= expected - found < getattr(model, "vocab_padding_limit", PADDING_LIMIT):
        raise ValueError(
            f"the tokenizer has {found:,} tokens and the model a vocabulary of {expected:,}: they do not belong "
            "together; give the model's own directory, tokenizer.json included"
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
    """Score every ending after its context.

    A request longer than the model's context loses tokens on the left, as in lm-evaluation-harness; an ending that does
    not fit at all is scored in windows of half the context, each after the tokens before it.

    Args:
        model: a GPT, or anything with its `config.block_size` and `vocab_size` and a forward that takes `input_ids` and
            `logits_to_keep`; without `new_cache` a context is computed again for each ending.
        batch_size: sequences a forward pass; None is 8 on CPU and 64 elsewhere. The scores do not depend on it beyond
            rounding.
        rank, world_size: this process computes every world_size-th batch. All call the model equally often, as FSDP
            needs.
        reduce: sums a tensor over all ranks in place; needed with world_size > 1.
        progress: told how many requests were finished, here, since it was last told.

    Returns the scores of all requests on every rank.
    Raises ValueError for an id outside the vocabulary and for logits that are not finite, with the requests' numbers.
    """
    if world_size > 1 and reduce is None:
        raise ValueError(f"{world_size} processes need a `reduce` that sums over them")
    device = next(model.parameters()).device
    batch_size = batch_size or (8 if device.type == "cpu" else 64)
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    for i, request in enumerate(requests):
        if not request.context or not request.ending:
            raise ValueError(f"request {i} has an empty {'ending' if request.context else 'context'}")
        if max(max(request.context), max(request.ending)) >= vocab_size:
            raise ValueError(
                f"request {i} has a token id outside the model's vocabulary of {vocab_size:,}: the tokenizer and the "
                "model do not belong together"
            )
    batches = _make_batches(requests, block_size, batch_size)
    # On every rank, so that each can tell how often the others call the model.
    passes = [sum(batch.passes(batch_size) for batch in batches[r::world_size]) for r in range(world_size)]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    scores = torch.zeros(2, len(requests), dtype=dtype, device=device)  # log-probability; tokens that are not greedy
    with _eval_mode(model):
        head = _output_head(model)
        for batch in batches[rank::world_size]:
            for ending_of, log_probs, misses in _score(model, head, batch, batch_size):
                index = torch.tensor(ending_of, device=device)
                scores[0].index_add_(0, index, log_probs.to(dtype).sum(1))
                scores[1].index_add_(0, index, misses.to(dtype).sum(1))
                if progress is not None:
                    progress(len(ending_of))
        for _ in range(max(passes) - passes[rank]):
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
    if reduce is not None:
        reduce(scores)
    sums, misses_per_request = scores.cpu().numpy().astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(sums))
    if len(wrong):
        raise ValueError(
            f"the model's logits are not finite (NaN or infinite) for {len(wrong)} of {len(requests)} requests, the "
            f"first being number {wrong[0]}: nothing was scored; the weights are damaged or overflow in this dtype"
        )
    return Scores(sums, misses_per_request == 0)


def _make_batches(requests: Sequence[Request], block_size: int, batch_size: int) -> list[_Batch]:
    groups: dict[tuple[int, ...], list[_Part]] = {}
    for i, (context, ending) in enumerate(requests):
        step = len(ending) if len(ending) <= block_size else max(1, block_size // 2)
        for start in range(0, len(ending), step):
            piece = ending[start : start + step]
            # The last token of the ending is only predicted, so context and ending may be one longer than the block.
            before = (context + ending[:start])[-(block_size + 1 - len(piece)) :]
            groups.setdefault(before, []).append(_Part(piece, i))
    batches: list[_Batch] = []
    longest = 0
    # Longest first: a shortage of memory shows at once, and the time left is not underestimated.
    for context in sorted(groups, key=len, reverse=True):
        longest = max(longest, *(len(part.ending) for part in groups[context]))
        full = not batches or len(batches[-1].contexts) == batch_size
        if full or len(batches[-1].contexts[0]) - 1 + longest > block_size:
            batches.append(_Batch([], []))
            longest = max(len(part.ending) for part in groups[context])
        batches[-1].contexts.append(context)
        batches[-1].parts.append(groups[context])
    return batches


def _score(
    model: Any, head: Tensor | None, batch: _Batch, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """For each group of R endings: the requests they are of, and by token (R, T) the log-probabilities, 0 where there
    is none, and True where another token was the most likely. `head` is that of `_output_head`."""
    device = next(model.parameters()).device
    # The last token of a context goes with the endings: its logits are those of their first token.
    contexts, mask = _pad([context[:-1] for context in batch.contexts], device, left=True)  # (G, P)
    cache = None
    if head is not None and contexts.size(1):
        cache = model.new_cache(*contexts.shape)
        model(contexts, attention_mask=mask, cache=cache, return_logits=False)
    for rows in batch.rows(batch_size):
        owner = torch.tensor([i for i, _ in rows], device=device)
        targets, kept = _pad([part.ending for _, part in rows], device)  # (R, T)
        if head is not None:
            inputs, _ = _pad([(batch.contexts[i][-1], *part.ending[:-1]) for i, part in rows], device)
            row_mask = torch.cat([mask[owner], torch.ones_like(kept)], dim=1)  # padding on the right is never looked at
            row_cache = None if cache is None else _copy_rows(model, cache, owner, inputs.size(1))
            output = model(inputs, attention_mask=row_mask, cache=row_cache, return_logits=False)
            found = output.last_hidden_state[kept].to(head.dtype)  # (tokens, C), the head to come
        else:
            # Padded on the right alone, so that neither a mask nor positions are needed: peers differ in those.
            lengths = torch.tensor([len(batch.contexts[i]) for i, _ in rows], device=device).unsqueeze(1)
            inputs, _ = _pad([batch.contexts[i] + part.ending[:-1] for i, part in rows], device)
            first = int(lengths.min()) - 1
            offset = torch.arange(first, inputs.size(1), device=device) - (lengths - 1)
            scored = (offset >= 0) & (offset < kept.sum(dim=1, keepdim=True))
            found = model(inputs, logits_to_keep=inputs.size(1) - first).logits[scored]  # (tokens, V)
        log_probs = torch.zeros(targets.shape, device=device)
        misses = torch.zeros_like(kept)
        log_prob, miss = [], []
        for x, target in zip(found.split(SOFTMAX_ROWS), targets[kept].split(SOFTMAX_ROWS), strict=True):
            row_logits = (x if head is None else F.linear(x, head)).float()
            log_prob.append(-F.cross_entropy(row_logits, target, reduction="none"))
            miss.append(row_logits.argmax(dim=-1) != target)
        log_probs[kept], misses[kept] = torch.cat(log_prob), torch.cat(miss)
        yield [part.request for _, part in rows], log_probs, misses


def _output_head(model: Any) -> Tensor | None:
    """The (V, C) matrix from a GPT's last hidden state to logits, in the dtype of the computation; None for a peer."""
    if not hasattr(model, "new_cache"):
        return None
    weight = model.transformer.wte.weight.detach()
    if hasattr(weight, "full_tensor"):  # sharded by FSDP
        weight = weight.full_tensor()
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return centered_head(weight, dtype)


def _pad(sequences: list[tuple[int, ...]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids (B, longest) padded with 0, and True (B, longest) where they are not padding."""
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    kept = torch.zeros(len(sequences), length, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if left else slice(len(sequence))
        ids[i, place] = torch.tensor(sequence, dtype=torch.long)
        kept[i, place] = True
    return ids.to(device), kept.to(device)


def _copy_rows(model: Any, cache: Any, rows: Tensor, extra: int) -> Any:
    """A cache that begins with the given rows (R,) of `cache` and has room for `extra` tokens more."""
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
