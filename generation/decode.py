"""`generate`: continue prompts by greedy decoding, sampling or beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Generator, Tensor

from generation.beam_search import beam_search
from generation.options import GenerateOutput, GenerationOptions, Processor, Tokenizer
from generation.prompts import prepare_prompts
from generation.sampling import sample
from model import GPT

P = ParamSpec("P")
R = TypeVar("R")


@torch.no_grad()
def generate_with_options(
    model: GPT, input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None, options: GenerationOptions
) -> Tensor | GenerateOutput:
    """Continue prompts as `generate` does. `options` holds all other arguments of `generate`."""
    ids, mask = prepare_prompts(model, input_ids, attention_mask, options)
    if options.num_beams == 1:
        return sample(model, ids, mask, options)
    output = beam_search(model, ids, mask, options)
    return output if options.return_dict else output.sequences


def collects_options(implementation: Callable[..., R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a function without a body, whose signature and docstring describe the options.

    The decorated function makes a GenerationOptions from its keyword arguments other than attention_mask, and passes it
    to `implementation`. The constructor of GenerationOptions checks the arguments.
    """

    def decorate(declaration: Callable[P, R]) -> Callable[P, R]:
        @wraps(declaration)
        def call(model: GPT, input_ids: Any, *, attention_mask: Tensor | None = None, **options: Any) -> R:
            return implementation(model, input_ids, attention_mask, GenerationOptions(**options))

        return cast(Callable[P, R], call)

    return decorate


@collects_options(generate_with_options)
def generate(  # type: ignore[empty-body]
    model: GPT,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    bad_words_ids: Sequence[Sequence[int]] | None = None,
    min_new_tokens: int = 0,
    stop_strings: str | Sequence[str] | None = None,
    stop_in_prompt: bool = True,
    num_return_sequences: int = 1,
    gumbel: bool = False,
    sliding: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    generator: Generator | Sequence[Generator] | None = None,
    logits_processor: Processor | Sequence[Processor] | None = None,
    tokenizer: Tokenizer | None = None,
    return_dict: bool = False,
    output_logits: bool = False,
    output_scores: bool = False,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
) -> Tensor | GenerateOutput:
    """Continue each prompt by up to `max_new_tokens` tokens, greedily unless do_sample is set or num_beams > 1.

    Args:
        model: a model in eval mode.
        input_ids: (B, T), padded on the left if prompts differ in length, or a list of token lists, which is padded
            automatically.
        attention_mask: (B, T), 0 for padding. It is allowed only if input_ids is a tensor. None means that the tensor
            has no padding.
        do_sample: sample from softmax(scores / temperature), restricted by top_k, top_p and min_p in this order.
        top_k: keep the top_k most probable tokens. None or 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities sum to at least top_p. None keeps all.
        min_p: keep the tokens that are at least min_p times as probable as the most probable token. None keeps all.
        num_beams: number of beams of each prompt. Finished hypotheses are compared by
            log-probability / (new tokens ** length_penalty).
        early_stopping: when beam search ends for a prompt that has num_beams finished hypotheses. True: at once. False:
            as soon as no running beam, at its present length, scores higher than the worst finished hypothesis.
            "never": as soon as no running beam could score higher, even after more tokens, up to max_new_tokens.
        repetition_penalty: for tokens that the row already contains, including its prompt, divide positive scores by
            this number and multiply negative scores by it.
        no_repeat_ngram_size: a number n. Ban each token that would complete an n-gram that the row, including its
            prompt, already contains. 0 bans no token.
        bad_words_ids: token sequences that must not be generated. A sequence that is a single eos token is ignored.
        min_new_tokens: ban the eos tokens until a row has this number of new tokens.
        stop_strings: strings that end a row when they appear in its text. They need `tokenizer`, which decodes the row.
        stop_in_prompt: a stop string may begin in the prompt, as in transformers. With False, it ends a row only if all
            of it is in the new tokens.
        num_return_sequences: number of results for each prompt. The results of a prompt are adjacent rows.
        gumbel: sample with the Gumbel-max trick. The distribution is the same as without `gumbel`, but the same seed
            gives other tokens.
        sliding: allow more tokens than block_size. The model then sees only the last block_size tokens.
        eos_token_id: the token or tokens that end a row. The rest of an ended row is filled with the first of these
            tokens. None means the tokenizer's end-of-text if there are stop_strings, and no token otherwise.
        generator: one generator for all rows, or one for each of the B * num_return_sequences rows (in beam search, for
            each of the B prompts). If each row has its own generator, its random numbers do not depend on the other
            rows. Generators must be on the model's device. None means PyTorch's default generator.
        logits_processor: a function or functions (ids, scores) -> scores, called after the other processors and before
            the scores are divided by the temperature.
        tokenizer: required for stop_strings. Token ids outside its vocabulary are never chosen.
        return_dict: return a GenerateOutput, which holds the tensors requested by output_logits, output_scores,
            output_hidden_states and output_attentions.

    Returns:
        (B * num_return_sequences, T + new tokens) ids, including prompt and padding, or a GenerateOutput. There are
        fewer than max_new_tokens new tokens if all rows end earlier.

    Raises:
        ValueError: an option is impossible, an id is outside the vocabulary, the tokens do not fit in block_size, all
            tokens are banned, or the model's logits are NaN.
    """
