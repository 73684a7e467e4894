"""Generate text: `stream` yields it token by token, `generate_text` continues any number of prompts in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from generation.decode import generate_with_options
from generation.forward import find_ended
from generation.options import GenerateOutput, GenerationOptions, Tokenizer
from generation.prompts import encode_prompt, prepare_prompts
from generation.sampling import sample_steps
from model import GPT


class StreamedToken(NamedTuple):
    """A new token, and the text that it completes: whole characters, or "" while a character is incomplete.

    If the last token leaves a character incomplete, its text ends with U+FFFD in place of this character.
    """

    token: int
    text: str
    logits: Tensor  # (V,), unprocessed


def stream(
    model: GPT, tokenizer: Tokenizer, prompt: str | Sequence[int], *, max_new_tokens: int, **options: Any
) -> Iterator[StreamedToken]:
    """Continue one prompt and yield each new token as soon as it is chosen. An eos token adds no text.

    The options are those of `generate`, but num_beams and num_return_sequences must be 1. The texts of all tokens,
    joined together, are the decoded continuation. An impossible request raises ValueError at the call, before the first
    token.
    """
    chosen = GenerationOptions(max_new_tokens=max_new_tokens, tokenizer=tokenizer, **options)
    if chosen.num_beams > 1 or chosen.num_return_sequences > 1:
        raise ValueError("only one sequence can be streamed: set num_beams and num_return_sequences to 1")
    # If this function were a generator, it would check the request only when the caller asks for the first token.
    ids, mask = prepare_prompts(model, [encode_prompt(tokenizer, prompt)], None, chosen)
    return _stream_tokens(model, tokenizer, ids, mask, chosen)


def _stream_tokens(
    model: GPT, tokenizer: Tokenizer, ids: Tensor, mask: Tensor | None, options: GenerationOptions
) -> Iterator[StreamedToken]:
    pending: list[int] = []  # tokens that are not in a yielded text yet, because a character is incomplete
    for step in sample_steps(model, ids, mask, options):
        token = int(step.tokens[0])
        if token not in options.eos:
            pending.append(token)
        text = tokenizer.decode(pending)
        if text.endswith("\ufffd") and not step.is_last:
            text = ""
        else:
            pending = []
        yield StreamedToken(token, text, step.logits[0])


class Completion(NamedTuple):
    """A prompt and its continuation. `text` and `tokens` contain neither the prompt nor the eos token."""

    prompt: str
    text: str
    tokens: list[int]
    logprobs: list[float]  # log-probability of each of `tokens`, from the unprocessed logits
    finish_reason: Literal["stop", "length"]  # "stop": eos or a stop string; "length": max_new_tokens tokens


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    batch_size: int = 8,
    seed: int | None = None,
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> list[Completion]:
    """Continue any number of prompts in batches. The prompts of a batch have similar lengths.

    Args:
        batch_size: the largest number of prompts that are continued together.
        seed: the result with index i in the returned list is drawn with a generator of its own, which has the seed
            `seed + i`. In beam search, all results of prompt i are drawn with one generator of seed `seed + i`. So the
            batch size does not change the random numbers. In bfloat16, it may still change results by rounding. None
            means the generator in `options`, or else PyTorch's default generator.
        progress: called after each batch with the number of prompts in it.
        options: options of `generate`. The default of eos_token_id is the tokenizer's end-of-text.

    Returns:
        The completions in the order of the prompts. Each prompt has num_return_sequences adjacent completions.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one string, expected a list of strings")
    chosen = GenerationOptions(
        **{"eos_token_id": tokenizer.eot, "tokenizer": tokenizer, **options, "return_dict": True}
    )
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    # Continue the longest prompts first, so that a prompt that is too long raises its error at once.
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]), reverse=True)
    copies, by_prompt = chosen.num_return_sequences, chosen.num_beams > 1
    device = model.transformer.wte.weight.device
    results: dict[int, Completion] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        numbers = [i * copies + copy for i in batch for copy in range(copies)]
        if seed is not None:
            offsets = batch if by_prompt else numbers
            chosen = replace(chosen, generator=[Generator(device).manual_seed(seed + offset) for offset in offsets])
        out = generate_with_options(model, [encoded[i] for i in batch], None, chosen)
        assert isinstance(out, GenerateOutput)
        new_ids = out.sequences[:, out.sequences.size(1) - out.logprobs.size(1) :]
        rows = zip(numbers, new_ids.tolist(), out.logprobs.tolist(), out.lengths.tolist(), strict=True)
        for number, tokens, logprobs, length in rows:
            i = number // copies
            results[number] = _completion(prompts[i], encoded[i], tokens[:length], logprobs[:length], tokenizer, chosen)
        if progress is not None:
            progress(len(batch))
    return [results[number] for number in range(len(prompts) * copies)]


def _completion(
    prompt: str,
    prompt_tokens: list[int],
    tokens: list[int],
    logprobs: list[float],
    tokenizer: Tokenizer,
    options: GenerationOptions,
) -> Completion:
    """Return the completion for the new tokens of one row. The last token may be eos."""
    ended = bool(find_ended(torch.tensor([prompt_tokens + tokens]), None, len(prompt_tokens), options))
    length = len(tokens) - (tokens[-1] in options.eos)
    reason: Literal["stop", "length"] = "stop" if ended else "length"
    return Completion(prompt, tokenizer.decode(tokens[:length]), tokens[:length], logprobs[:length], reason)
