"""Greedy decoding and sampling, one token for each row at a time, and Gumbel-softmax samples with a gradient."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from generation.forward import CachedForward, empty_records, find_ended, record
from generation.options import GenerateOutput, GenerationOptions
from generation.processors import BANNED, make_processor
from kernels.argmax import argmax
from model import GPT, GPTOutput

# On a GPU, check only after this number of steps whether all rows have ended, because the host waits in a check.
STEPS_BETWEEN_CHECKS = 16


def gumbel_noise(like: Tensor, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """Return independent samples of Gumbel(0, 1), computed as -log E with E ~ Exp(1), in the shape (N, V) of `like`.

    `generator` is one generator for all rows, or a sequence with one for each row.
    """
    if isinstance(generator, Sequence):
        return torch.cat([gumbel_noise(row[None], one) for row, one in zip(like, generator, strict=True)])
    return -torch.empty_like(like).exponential_(generator=generator).log()


def draw(scores: Tensor, count: int, generator: Generator | Sequence[Generator] | None, gumbel: bool = False) -> Tensor:
    """Sample `count` different tokens for each row from softmax(scores), in the order drawn: (N, V) -> (N, count).

    With `gumbel`, Gumbel noise is added to the scores, and the tokens with the highest sums are taken. The samples have
    the same distribution as without `gumbel` (Maddison et al. 2014), even if several tokens are drawn (Kool et al.
    2019).
    """
    if gumbel:
        return (scores + gumbel_noise(scores, generator)).topk(count).indices
    if isinstance(generator, Sequence):
        rows = zip(scores.split(1), generator, strict=True)
        return torch.cat([draw(row, count, one) for row, one in rows])
    probabilities = scores.softmax(dim=-1)
    if scores.is_cuda:
        return draw_without_waiting(probabilities, count, generator)
    return torch.multinomial(probabilities, count, generator=generator)


def draw_without_waiting(probabilities: Tensor, count: int, generator: Generator | None) -> Tensor:
    """Sample without replacement, (N, V) -> (N, count), with the same computation and result as `torch.multinomial`.

    `torch.multinomial` also checks the probabilities, and the host has to wait for the GPU's result of this check.
    """
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).topk(count).indices


_one_thread_is_set = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Return a context in which PyTorch runs its operators in the calling thread only.

    After PyTorch has run an operator in several threads, these threads spin for a few milliseconds. They would compete
    for the cores with NumPy's threads, which compute the next forward pass of a `NumpyStep`.

    The number of threads is a setting of the whole process. So if another thread is already inside `one_thread`, this
    call changes nothing. A thread that first uses PyTorch while the setting is 1 keeps using one thread.
    """
    if not _one_thread_is_set.acquire(blocking=False):
        yield
        return
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
        _one_thread_is_set.release()


class Step(NamedTuple):
    """One new token for each row, and the tensors that the tokens were chosen from."""

    tokens: Tensor  # (N,)
    logits: Tensor  # (N, V), unprocessed
    scores: Tensor  # (N, V), processed
    output: GPTOutput
    running: Tensor  # (N,) booleans, True for each row that had not ended before this token
    is_last: bool  # whether no step follows


@torch.no_grad()
def sample_steps(
    model: GPT, ids: Tensor, mask: Tensor | None, options: GenerationOptions, check_every: int = 1
) -> Iterator[Step]:
    """Continue ids (N, T) greedily or by sampling, and yield each step as soon as its tokens are chosen.

    mask is (N, T + max_new_tokens) or None, as `prepare_prompts` returns it. The function checks only after every
    `check_every` steps whether all rows have ended, so it may yield up to check_every - 1 steps too many. Raises
    ValueError if all tokens of a row are banned, or if the model's logits are NaN.
    """
    rows, prompt_length = ids.shape
    length = prompt_length + options.max_new_tokens
    forward = CachedForward(model, ids, mask, options)
    process = make_processor(options, prompt_length, mask)
    may_ban_all = options.no_repeat_ngram_size or options.bad_words_ids or options.logits_processor
    running = torch.ones(rows, dtype=torch.bool, device=ids.device)
    ids = F.pad(ids, (0, options.max_new_tokens))
    for t in range(prompt_length, length):
        logits, output = forward(ids[:, :t])
        with one_thread() if forward.numpy else nullcontext():
            scores = process(ids[:, :t], logits)
            if may_ban_all and (scores[running] == BANNED).all(dim=-1).any():
                raise ValueError(f"no token is left to choose at position {t}: all are banned")
            if options.do_sample:
                # All tokens of a row that has ended may be banned. Drawing from such scores would raise an error, so
                # the scores of ended rows are set to 0.
                choices = scores.masked_fill(~running[:, None], 0.0) if may_ban_all else scores
                tokens = draw(choices, 1, options.generator, options.gumbel)[:, 0]
            else:
                tokens = argmax(scores)
        was_running, is_last = running, t + 1 == length
        if options.eos:
            tokens = tokens.where(running, options.eos[0])
        ids[:, t] = tokens
        if options.eos:
            running = running & ~find_ended(ids[:, : t + 1], mask, prompt_length, options)
            if (t + 1 - prompt_length) % check_every == 0:
                is_last = is_last or not running.any()
        yield Step(tokens, logits, scores, output, was_running, is_last)
        if is_last:
            return


def steps_between_checks(device: torch.device, options: GenerationOptions) -> int:
    """Return the number of steps between two checks whether all rows have ended.

    With stop strings, the host decodes the tokens of each step, so it waits for the GPU in each step anyway.
    """
    return STEPS_BETWEEN_CHECKS if device.type == "cuda" and not options.stop_strings else 1


def sample(model: GPT, ids: Tensor, mask: Tensor | None, options: GenerationOptions) -> Tensor | GenerateOutput:
    """Continue ids (N, T) greedily or by sampling. Returns what `generate` returns."""
    records = empty_records(options)
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    lengths = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    for step in sample_steps(model, ids, mask, options, steps_between_checks(ids.device, options)):
        tokens.append(step.tokens)
        lengths += step.running
        if options.return_dict:
            record(records, step.logits, step.scores, step.output)
            logprob = -F.cross_entropy(step.logits, step.tokens, reduction="none")
            logprobs.append(logprob.where(step.running, 0.0))
    steps = int(lengths.max())  # `tokens` may hold more steps, which were made after all rows had ended
    sequences = torch.cat((ids, torch.stack(tokens[:steps], dim=1)), dim=1)
    if not options.return_dict:
        return sequences
    records = {name: values[:steps] for name, values in records.items()}
    token_logprobs = torch.stack(logprobs[:steps], dim=1)  # (N, S)
    sequences_scores = token_logprobs.sum(dim=1) / lengths**options.length_penalty
    return GenerateOutput(sequences, token_logprobs, sequences_scores, lengths, **records)


def gumbel_softmax(
    model: GPT,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    hard: bool = False,
    generator: Generator | Sequence[Generator] | None = None,
) -> Tensor:
    """Draw relaxed samples that gradients can flow through: softmax((logits + Gumbel noise) / temperature).

    The input of the next step is the mean of all token embeddings, weighted by the sample (Jang et al. 2017;
    GumbelSoftmaxEmbeddingHelper in Texar). Each step reads all tokens again, because no gradient flows through a cache.

    Args:
        input_ids, attention_mask: (B, T), padded on the left.
        hard: return one-hot samples, with the gradient of the soft samples (straight-through estimator).
        generator: one generator for all rows, or a sequence with one for each row.

    Returns:
        (B, max_new_tokens, V). Each row of V numbers sums to 1.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    embedding = model.transformer.wte.weight
    embeds = F.embedding(input_ids, embedding)
    samples: list[Tensor] = []
    for _ in range(max_new_tokens):
        logits = model(inputs_embeds=embeds, attention_mask=attention_mask, logits_to_keep=1).logits[:, -1].float()
        soft = ((logits + gumbel_noise(logits, generator)) / temperature).softmax(dim=-1)
        if hard:
            soft = F.one_hot(soft.argmax(dim=-1), soft.size(1)) + soft - soft.detach()
        samples.append(soft)
        embeds = torch.cat((embeds, (soft.to(embedding.dtype) @ embedding)[:, None]), dim=1)
        attention_mask = None if attention_mask is None else F.pad(attention_mask, (0, 1), value=1)
    return torch.stack(samples, dim=1)
