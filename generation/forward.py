"""Code shared by sampling and beam search: the cached forward pass, stop conditions, and recorded outputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from generation.fixed_step import FixedStep
from generation.numpy_step import NumpyStep, numpy_can_read
from generation.options import GenerationOptions, Tokenizer
from model import GPT, GPTOutput

# Minimum number of new tokens for a `FixedStep`: for fewer, its CUDA graph probably costs more time than it saves.
MIN_GRAPH_TOKENS = 8


def needs_only_logits(options: GenerationOptions) -> bool:
    """Return whether the options request no output of the model besides its logits."""
    return not (options.output_hidden_states or options.output_attentions)


def uses_fixed_step(model: GPT, options: GenerationOptions) -> bool:
    """Return whether single tokens are read by a `FixedStep`, which needs CUDA and returns only logits.

    A FixedStep supports only `attention="full"`, because its mask is that of full attention. It cannot use weights that
    FSDP has sharded, because FSDP gathers the weights only in a forward pass through the whole model.
    """
    weight = model.transformer.wte.weight
    long_enough = options.max_new_tokens >= MIN_GRAPH_TOKENS
    full, sharded = model.config.attention == "full", hasattr(weight, "full_tensor")
    return weight.is_cuda and long_enough and needs_only_logits(options) and full and not sharded


def uses_numpy_step(model: GPT, rows: int, mask: Tensor | None, options: GenerationOptions) -> bool:
    """Return whether a `NumpyStep` reads single tokens.

    It supports only one row without padding, returns only logits, and needs a model that `numpy_can_read` accepts.
    """
    return rows == 1 and mask is None and needs_only_logits(options) and numpy_can_read(model)


class CachedForward:
    """The model's forward pass over rows that grow by a token in each step. It reads only tokens that are not cached.

    If rows are longer than block_size, each step reads all of their last block_size tokens. The position of each of
    these tokens changes in every step, and cached keys and values are useless at another position.
    """

    def __init__(self, model: GPT, ids: Tensor, mask: Tensor | None, options: GenerationOptions) -> None:
        self.model, self.mask, self.options = model, mask, options
        length = ids.size(1) + options.max_new_tokens - 1  # the last new token is never an input of the model
        self.fixed = uses_fixed_step(model, options)
        if self.fixed:
            # Round up to a multiple of 8: CUDA's attention copies a mask if the size of its rows is not a multiple of
            # 16 bytes, which are 8 numbers of 16 bits.
            length = -(-length // 8) * 8
        self.cache = model.new_cache(len(ids), min(length, model.config.block_size))
        self.numpy = not self.fixed and uses_numpy_step(model, len(ids), mask, options)
        self.step: FixedStep | NumpyStep | None = None
        self.head = model._modules.get("decoding_head")  # the DecodingHead that `pack_weights` adds, or None without it
        self.checked = False

    def __call__(self, ids: Tensor) -> tuple[Tensor, GPTOutput]:
        """Return the float32 logits (N, V) of the token after ids (N, T), and the model's output.

        V is the vocab_size of the model or that of the tokenizer in the options, whichever is smaller. If a FixedStep
        or a NumpyStep has read the last token of ids, the output holds only the cache.

        Raises:
            ValueError: a logit of the first call is NaN.
        """
        first = max(0, ids.size(1) - self.model.config.block_size)
        if first:
            self.cache.crop(0)
        if (self.fixed or self.numpy) and not first and ids.size(1) == self.cache.length + 1:
            logits, output = self._read_one(ids[:, -1:]), GPTOutput(cache=self.cache)
        else:
            logits, output = self._read(ids, first)
        if not self.checked and logits.isnan().any():  # only in the first call, because the host waits for the result
            raise ValueError(
                "the model's logits are NaN: its weights are damaged or overflow in this dtype. Use another "
                "checkpoint or float32"
            )
        self.checked = True
        return logits[:, : self.options.n_choices(logits.size(1))], output

    def _read(self, ids: Tensor, first: int) -> tuple[Tensor, GPTOutput]:
        """Return the logits (N, V) of the token after ids (N, T), and the model's output.

        The model does not see the ids before index `first`. Of the other ids, it reads those that the cache does not
        hold yet.
        """
        output = self.model(
            ids[:, first + self.cache.length :],
            attention_mask=None if self.mask is None else self.mask[:, first : ids.size(1)],
            cache=self.cache,
            return_logits=self.head is None,
            logits_to_keep=1,
            output_hidden_states=self.options.output_hidden_states,
            output_attentions=self.options.output_attentions,
        )
        logits = output.logits[:, -1].float() if self.head is None else self.head(output.last_hidden_state[:, -1])
        return logits, output

    def _read_one(self, tokens: Tensor) -> Tensor:
        """Add one token of each row to the cache: `tokens` (N, 1). Return the logits (N, V) of the next tokens."""
        if self.step is None and self.numpy:
            self.step = NumpyStep(self.model, self.cache)
        elif self.step is None:
            weight = self.model.transformer.wte.weight
            head = self.head or (lambda x: F.linear(x, weight).float())
            self.step = FixedStep(self.model, self.cache, self.mask, head, capture=weight.is_cuda)
        return self.step(tokens)


def empty_records(options: GenerationOptions) -> dict[str, Any]:
    """Return {name: []} for each output that the options request. `record` appends to these lists at every step."""
    names = ("logits", "scores", "hidden_states", "attentions")
    return {name: [] for name in names if getattr(options, f"output_{name}")}


def record(records: dict[str, Any], logits: Tensor, scores: Tensor, output: GPTOutput) -> None:
    """Append one step's tensors to the lists that `empty_records` has made."""
    values = output._asdict() | {"logits": logits, "scores": scores}
    for name, steps in records.items():
        steps.append(values[name])


def ends_with_stop_string(ids: Sequence[int], stop_strings: Sequence[str], tokenizer: Tokenizer) -> bool:
    """Return whether the last token completes a stop string. The token's text may continue after the stop string.

    The search begins after the last end-of-text token in ids[:-1], whose text is not part of the generated text.
    """
    # Each token has at least one byte, so a stop string of n bytes spans at most n tokens.
    tail = ids[-max(len(stop.encode()) for stop in stop_strings) :]
    tail = tail[max((i + 1 for i, token in enumerate(tail[:-1]) if token == tokenizer.eot), default=0) :]
    text, before = tokenizer.decode(tail), tokenizer.decode(tail[:-1]).rstrip("\ufffd")
    ends = [text.rfind(stop) + len(stop) for stop in stop_strings if stop in text]
    return any(end > len(before) for end in ends)


def find_ended(ids: Tensor, mask: Tensor | None, prompt_length: int, options: GenerationOptions) -> Tensor:
    """Return (N,) booleans, True for each row of ids (N, T) whose last token ends the row.

    mask is (N, T or more), 0 for padding, or None if no row is padded. Padding is not searched for stop strings, and
    neither are the first prompt_length tokens if options.stop_in_prompt is False.
    """
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for token in options.eos:  # a loop: a tensor of all these tokens would be copied to a GPU, and the host would wait
        ended |= ids[:, -1] == token
    if options.stop_strings:
        assert options.tokenizer is not None
        stops = [options.stop_strings] if isinstance(options.stop_strings, str) else options.stop_strings
        first = 0 if options.stop_in_prompt else prompt_length
        rows = ids[:, first:].tolist()
        if mask is not None:
            kept = mask[:, first : ids.size(1)].tolist()
            rows = [[*compress(row, keep)] for row, keep in zip(rows, kept, strict=True)]
        by_text = [ends_with_stop_string(row, stops, options.tokenizer) for row in rows]
        ended |= torch.tensor(by_text, device=ids.device)
    return ended
