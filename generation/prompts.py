"""Turn prompts into a batch of token ids and an attention mask, and check whether the model can process a request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from generation.options import GenerationOptions, Tokenizer
from model import GPT


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Return the token ids of a prompt. An empty prompt becomes one end-of-text token.

    In the training data, this token stands before each document, so the model then begins a new document.
    """
    return (tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)) or [tokenizer.eot]


def left_pad(prompts: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Pad prompts of different lengths on the left with `fill`. Returns ids (B, T) and attention mask (B, T).

    Raises ValueError if there are no prompts, if a prompt is empty, or if `prompts` is a single list of ids.
    """
    if any(isinstance(prompt, int) for prompt in prompts):
        raise ValueError("got one list of ids, expected a list of such lists, one for each prompt")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("expected at least one prompt, and at least one token in each prompt")
    length = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[fill] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def prepare_prompts(
    model: GPT, input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None, options: GenerationOptions
) -> tuple[Tensor, Tensor | None]:
    """Check whether the model can process the prompts with these options, and return the batch for the first step.

    Returns:
        ids: (N, T) on the model's device. A prompt has num_return_sequences adjacent rows, or one row in beam search.
        mask: (N, T + max_new_tokens), 0 for padding, or None if no prompt is padded.

    Raises:
        ValueError: token ids, shapes, lengths or the number of generators are impossible for this model.
    """
    config = model.config
    vocab_size = options.n_choices(config.vocab_size)
    options.check_token_ids(vocab_size)
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise ValueError("a list of prompts is padded and masked automatically: leave out attention_mask")
        input_ids, attention_mask = left_pad(input_ids, fill=options.eos[0] if options.eos else 0)
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}, expected (batch, tokens), both at least 1")
    low, high = (int(value) for value in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids contain {low if low < 0 else high}, outside 0..{vocab_size - 1}")
    prompt_length = input_ids.size(1)
    # The last new token is never an input of the model, so a row can have block_size + 1 tokens.
    if prompt_length + options.max_new_tokens - 1 > config.block_size and not options.sliding:
        raise ValueError(
            f"{prompt_length} prompt tokens + {options.max_new_tokens} new > block_size {config.block_size} + 1: "
            f"generate fewer tokens or shorten the prompt (or let the model see only the last {config.block_size} "
            f"tokens: --sliding, in Python sliding=True)"
        )
    mask = attention_mask
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, but input_ids {tuple(input_ids.shape)}")
        if not mask[:, -1].all():
            raise ValueError("attention_mask ends with 0, but prompts must be padded on the left")
        mask = None if mask.all() else F.pad(mask, (0, options.max_new_tokens), value=1)
    copies = options.num_return_sequences if options.num_beams == 1 else 1
    if isinstance(options.generator, Sequence) and len(options.generator) != len(input_ids) * copies:
        raise ValueError(
            f"got {len(options.generator)} generators, expected one for all rows or {len(input_ids) * copies}, a "
            f"generator for each row"
        )
    device = model.transformer.wte.weight.device
    ids, mask = (None if x is None else x.repeat_interleave(copies, dim=0).to(device) for x in (input_ids, mask))
    assert ids is not None
    return ids, mask
