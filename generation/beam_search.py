"""Beam search: keep the most probable continuations of each prompt at every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from generation.forward import CachedForward, empty_records, find_ended, record
from generation.options import GenerateOutput, GenerationOptions
from generation.processors import make_processor
from generation.sampling import draw
from model import GPT

# A score so low that other beams are selected first. To exclude a beam, the code adds this number to the beam's score.
# It is finite, because the code multiplies it by booleans, and -inf * False would be NaN.
IMPOSSIBLE = -1.0e9


class Beams(NamedTuple):
    """Hypotheses for B prompts, the same number for each prompt.

    A hypothesis is a prompt with one continuation. A Beams holds one of three kinds of hypotheses: the K running ones
    of each prompt, which the next step continues; the K best finished ones of each prompt; or the candidates of a step,
    from which new running and finished ones are chosen. Running and finished hypotheses are sorted by descending score.
    If a Beams holds candidates, K in the shapes below is the number of candidates of each prompt.
    """

    # (B, K), the sum of the log-probabilities of the new tokens, as changed by processors.py. For a finished
    # hypothesis, the sum is divided by (number of new tokens) ** length_penalty.
    scores: Tensor
    ids: Tensor  # (B, K, prompt + max_new_tokens)
    logprobs: Tensor  # (B, K, max_new_tokens), log-probability of each new token, from the unprocessed logits
    # (B, K, max_new_tokens), for each new token, the row of the running beam that it continued: an index of the
    # B * num_beams rows of the forward pass. The index is -1 where there is no token yet.
    origins: Tensor

    @property
    def prompt_length(self) -> int:
        return self.ids.size(2) - self.logprobs.size(2)

    def take(self, which: Tensor) -> Beams:
        """Select k hypotheses of each prompt by their indices `which` (B, k)."""
        prompts = torch.arange(len(which), device=which.device)[:, None]
        return Beams(*(tensor[prompts, which] for tensor in self))

    def join(self, other: Beams) -> Beams:
        """Append another set of hypotheses for the same prompts."""
        return Beams(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))


@torch.no_grad()
def beam_search(model: GPT, ids: Tensor, mask: Tensor | None, options: GenerationOptions) -> GenerateOutput:
    """Keep the num_beams most probable continuations of each prompt at every step, and return the best finished ones.

    ids is (B, T). mask is (B, T + max_new_tokens), or None if no prompt is padded. The algorithm is that of
    `_beam_search` in transformers. The candidates of a step are the best (or, with do_sample, the sampled) pairs of a
    running beam and a next token. A candidate ends if its last token ends the row (see `find_ended`), or if it has
    max_new_tokens new tokens. `add_finished` adds candidates that end to the finished hypotheses. The best num_beams
    candidates that do not end become the running beams.
    """
    (n_prompts, prompt_length), K = ids.shape, options.num_beams
    length = prompt_length + options.max_new_tokens
    mask = None if mask is None else mask.repeat_interleave(K, dim=0)
    forward = CachedForward(model, ids.repeat_interleave(K, dim=0), mask, options)
    process = make_processor(options, prompt_length, mask)
    running, finished = start(ids, options)
    improvable = torch.ones(n_prompts, 1, dtype=torch.bool, device=ids.device)  # False if a prompt's search has ended
    records = empty_records(options)

    for t in range(prompt_length, length):
        rows = running.ids[:, :, :t].flatten(0, 1)  # (B * K, t)
        logits, output = forward(rows)
        logprobs = logits.log_softmax(dim=-1)
        scores = process(rows, logprobs)
        record(records, logits, scores, output)

        new = t - prompt_length
        candidates = extend(running, scores, logprobs, new, options)
        ended = torch.ones_like(candidates.scores, dtype=torch.bool)  # (B, n_candidates)
        if t + 1 < length:
            ids_so_far = candidates.ids[:, :, : t + 1].flatten(0, 1)
            candidate_mask = None if mask is None else mask[::K].repeat_interleave(ended.size(1), dim=0)
            ended = find_ended(ids_so_far, candidate_mask, prompt_length, options).view_as(ended)
        alive = candidates.scores + IMPOSSIBLE * ended
        running = candidates._replace(scores=alive).take(alive.topk(K).indices)
        finished = add_finished(finished, candidates, ended & improvable, new + 1, options)
        improvable &= can_improve(running, finished, new + 1, options)
        all_full = options.early_stopping is True and is_full(finished).all()
        if not improvable.any() or ended.all() or all_full:
            break
        forward.cache.reorder(running.origins[:, :, new].flatten())
    return best_results(finished, records, options)


def start(ids: Tensor, options: GenerationOptions) -> tuple[Beams, Beams]:
    """Return the running and the finished beams before the first step.

    All K running beams of a prompt are copies of the prompt. Only the first has the score 0, and the others have the
    score IMPOSSIBLE. All finished beams have the score IMPOSSIBLE, because no hypothesis is finished yet.
    """
    n_prompts, K = len(ids), options.num_beams
    fill = options.eos[0] if options.eos else 0
    blank = torch.zeros(n_prompts, K, options.max_new_tokens, device=ids.device)
    padded = F.pad(ids, (0, options.max_new_tokens), value=fill)[:, None].expand(-1, K, -1)
    finished = Beams(torch.full((n_prompts, K), IMPOSSIBLE, device=ids.device), padded, blank, blank.long() - 1)
    # If all running beams had the score 0, each candidate of the first step would appear K times.
    running = finished._replace(scores=finished.scores.index_fill(1, ids.new_tensor([0]), 0.0))
    return running, finished


def extend(running: Beams, scores: Tensor, logprobs: Tensor, new: int, options: GenerationOptions) -> Beams:
    """Return the candidates of a step: the best (or sampled) pairs of a running beam and a next token.

    scores are the processed log-probabilities of the next token, logprobs the unprocessed ones, both (B * K, V). new is
    the number of new tokens that each running beam already has.
    """
    (n_prompts, K), V = running.scores.shape, scores.size(1)
    # Each eos token ends at most K candidates, one for each beam. So at least K of (1 + the number of eos tokens) * K
    # candidates do not end in eos. Like transformers, return at least 2 K candidates, or all K * V if these are fewer.
    n_candidates = min(max(2, 1 + len(options.eos)) * K, K * V)
    totals = (running.scores[:, :, None] + scores.view(n_prompts, K, V)).flatten(1)  # (B, K * V)
    if options.do_sample:
        # With Gumbel noise, the scores also rank pairs whose probability is rounded to 0. torch.multinomial would
        # choose arbitrarily among these pairs.
        chosen = draw(totals, n_candidates, options.generator, gumbel=True)
    else:
        chosen = totals.topk(n_candidates).indices
    parents, tokens = chosen // V, chosen % V  # (B, n_candidates)
    candidates = running.take(parents)._replace(scores=totals.gather(1, chosen))
    candidates.ids[:, :, running.prompt_length + new] = tokens
    candidates.logprobs[:, :, new] = logprobs.view(n_prompts, -1).gather(1, chosen)
    first_row = torch.arange(n_prompts, device=scores.device)[:, None] * K
    candidates.origins[:, :, new] = first_row + parents
    return candidates


def is_full(finished: Beams) -> Tensor:
    """Return (B, 1) booleans, True for each prompt that has num_beams finished hypotheses."""
    return (finished.scores > IMPOSSIBLE / 2).all(dim=1, keepdim=True)


def add_finished(finished: Beams, candidates: Beams, ended: Tensor, length: int, options: GenerationOptions) -> Beams:
    """Return the best num_beams hypotheses among the finished ones and the candidates that end in this step.

    Only the first num_beams candidates of a prompt can be added: the best ones or, with do_sample, those drawn first.
    With early_stopping=True, no candidate is added if the prompt already has num_beams finished hypotheses. ended is
    (B, n_candidates), True for each candidate that ends; it is False for all candidates of a prompt whose search is
    over. length is the number of new tokens of each candidate.
    """
    K = options.num_beams
    may_finish = ended & ~(is_full(finished) & (options.early_stopping is True))
    may_finish[:, K:] = False
    final = candidates.scores / length**options.length_penalty + IMPOSSIBLE * ~may_finish
    both = finished.join(candidates._replace(scores=final))
    return both.take(both.scores.topk(K).indices)


def can_improve(running: Beams, finished: Beams, length: int, options: GenerationOptions) -> Tensor:
    """Return (B, 1) booleans, True for each prompt whose running beams can still improve its finished hypotheses.

    The beams can improve them if fewer than num_beams hypotheses are finished, or if the best running beam would score
    higher than the worst finished hypothesis. The beam's score is computed for `length`, the present number of new
    tokens. With early_stopping="never" and a positive length_penalty, it is computed for max_new_tokens.
    """
    at_full_length = options.early_stopping == "never" and options.length_penalty > 0
    final_length = options.max_new_tokens if at_full_length else length
    best_possible = running.scores[:, :1] / final_length**options.length_penalty
    return ~is_full(finished) | (best_possible > finished.scores[:, -1:])


def best_results(finished: Beams, records: dict[str, Any], options: GenerationOptions) -> GenerateOutput:
    """Return the best num_return_sequences finished hypotheses of each prompt, cut to the length of the longest.

    Raises ValueError if a prompt has fewer finished hypotheses, because too many tokens are banned.
    """
    best = Beams(*(tensor[:, : options.num_return_sequences].flatten(0, 1) for tensor in finished))
    lengths = (best.origins >= 0).sum(dim=1)
    undivided = best.scores * lengths.clamp(min=1) ** options.length_penalty  # the sum of log-probabilities
    if (torch.minimum(best.scores, undivided) < IMPOSSIBLE / 2).any():
        raise ValueError(
            f"a prompt has fewer than {options.num_return_sequences} continuations, because too many tokens are "
            f"banned: ban fewer tokens, or reduce num_return_sequences"
        )
    steps = int(lengths.max())
    return GenerateOutput(
        best.ids[:, : finished.prompt_length + steps],
        best.logprobs[:, :steps],
        best.scores,
        lengths,
        beam_indices=best.origins[:, :steps],
        **records,
    )
