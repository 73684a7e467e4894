"""Decoding over a GPT: greedy, sampling, beam search, streaming.

`generate` has the names and the meaning of transformers' method of that name, so that its results can be held against
it. Greedy and sampling are one loop, beam search another; both read, process the scores, choose, and stop or go on.

Shapes: N rows (prompts times sequences returned of each, or times beams), V = vocab_size; `ids` (N, T) is all that a
row holds so far, prompt and padding included.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from kernels.loss import centered_head
from model import GPT, GPTOutput

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids (N, T), scores (N, V)) -> scores (N, V), as in transformers
BANNED = -inf


class Tokenizer(Protocol):
    """What decoding needs of a tokenizer."""

    eot: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class GenerateOutput(NamedTuple):
    """What `generate` returns with return_dict=True; what was not asked for is None. S = steps taken."""

    sequences: Tensor  # (N, prompt + S); after its end a row holds eos
    logprobs: Tensor  # (N, S) of the chosen tokens under the model alone, before any processing; 0 after a row's end
    sequences_scores: Tensor  # (N,) their sum / (new tokens ** length_penalty); in beam search, of processed scores
    lengths: Tensor  # (N,) new tokens of each row, the one that ended it included
    logits: list[Tensor] | None = None  # S of (N, V) in fp32, as the model gave them
    scores: list[Tensor] | None = None  # S of (N, V), processed; in beam search, log-probabilities
    hidden_states: list[tuple[Tensor, ...]] | None = None  # S of n_layer + 1, the first step's over the prompt
    attentions: list[tuple[Tensor, ...]] | None = None  # S of n_layer
    beam_indices: Tensor | None = None  # (N, S) the row of `scores` that each token was chosen from, -1 after the end


class Options(SimpleNamespace):
    """The keyword arguments of `generate`, by name."""

    def check(self, vocab_size: int) -> None:
        rules = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "temperature must be above 0 (for greedy decoding set do_sample=False)": 0 < self.temperature < inf,
            "temperature must be at least 1e-30, as scores divided by less overflow": self.temperature >= 1e-30,
            "top_k must not be negative": (self.top_k or 0) >= 0,
            "top_p must be in (0, 1]": self.top_p is None or 0 < self.top_p <= 1,
            "min_p must be in [0, 1]": self.min_p is None or 0 <= self.min_p <= 1,
            "num_beams must be at least 1": self.num_beams >= 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
            "no_repeat_ngram_size must not be negative": self.no_repeat_ngram_size >= 0,
            "num_return_sequences must be at least 1": self.num_return_sequences >= 1,
            "early_stopping must be True, False or 'never'": self.early_stopping in (True, False, "never"),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{rule}, got {getattr(self, rule.split()[0])!r}")
        samples = self.temperature != 1 or self.top_k or self.top_p not in (None, 1) or self.min_p or self.gumbel
        if samples and not self.do_sample:
            raise ValueError("temperature, top_k, top_p, min_p and gumbel shape random choices: set do_sample=True")
        if self.num_beams == 1 and self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError("greedy decoding has one result: for several set do_sample=True or num_beams")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(f"num_return_sequences ({self.num_return_sequences}) exceeds num_beams ({self.num_beams})")
        if self.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need a tokenizer, to see the text")
        if self.stop_strings and not all(self.stop_strings):
            raise ValueError("stop_strings hold an empty one, which ends every text at once: leave it out")
        words = [token for word in self.bad_words_ids or () for token in word or (-1,)]
        if not all(0 <= token < vocab_size for token in (*words, *self.eos)):
            raise ValueError(f"bad_words_ids and eos_token_id must hold ids in 0..{vocab_size - 1}, no word be empty")

    @property
    def eos(self) -> list[int]:
        """The tokens that end a row, the first of which fills it from there on."""
        if self.eos_token_id is None:
            return [self.tokenizer.eot] if self.stop_strings and self.tokenizer else []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)


# ---------------------------------------------------------------------------------------------------------------------
# Processors: from the scores of the next token to other scores


def penalize_repetition(ids: Tensor, scores: Tensor, penalty: float) -> Tensor:
    """Divide by `penalty` the positive scores of tokens seen already, multiply negative ones (CTRL, section 4.1)."""
    seen = _tokens_to_mask(ids, scores)
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def ban_repeated_ngrams(ids: Tensor, scores: Tensor, n: int) -> Tensor:
    """Ban each token that would complete an n-gram for the second time."""
    if ids.size(1) < n:
        return scores
    ngrams = ids.unfold(1, n, 1)  # (N, T - n + 1, n)
    repeats = (ngrams[:, :, :-1] == ids[:, None, ids.size(1) - n + 1 :]).all(dim=-1)  # begins as the row ends
    return scores.masked_fill(_tokens_to_mask(ngrams[:, :, -1].masked_fill(~repeats, -1), scores), BANNED)


def ban_words(ids: Tensor, scores: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Ban each token that would complete one of `words`, which are sequences of tokens."""
    scores = scores.clone()
    for *start, last in words:
        if len(start) <= ids.size(1):
            begun = (ids[:, ids.size(1) - len(start) :] == ids.new_tensor(start)).all(dim=-1)
            scores[begun, last] = BANNED
    return scores


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Ban all but the k highest scores, and what ties with the k-th (Fan et al. 2018)."""
    return scores.masked_fill(scores < scores.topk(min(k, scores.size(1))).values[:, -1:], BANNED)


def keep_top_p(scores: Tensor, p: float, at_least: int = 1) -> Tensor:
    """Keep the likeliest tokens up to and including the one with which they reach probability p (Holtzman et al. 2020,
    nucleus sampling), ban the rest. Summed from the unlikely end, as transformers does: equal to the last bit."""
    ascending, order = scores.sort()
    banned = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    banned[:, -at_least:] = False
    return scores.masked_fill(banned.scatter(1, order, banned), BANNED)


def keep_min_p(scores: Tensor, p: float, at_least: int = 1) -> Tensor:
    """Ban tokens less likely than p times the likeliest (Nguyen et al. 2024)."""
    probabilities = scores.softmax(dim=-1)
    banned = probabilities < p * probabilities.amax(dim=-1, keepdim=True)
    likeliest = probabilities.topk(min(at_least, scores.size(1))).indices
    return scores.masked_fill(banned.scatter(1, likeliest, False), BANNED)


def _tokens_to_mask(tokens: Tensor, scores: Tensor) -> Tensor:
    """(N, V) booleans, True at the tokens (N, any number) of each row; -1 is no token."""
    mask = torch.zeros(len(scores), scores.size(1) + 1, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, tokens.where(tokens >= 0, scores.size(1)), True)[:, :-1]


def make_process(options: Options, prompt_length: int, mask: Tensor | None) -> Processor:
    """One processor out of all that the options ask for, in transformers' order. mask (N, prompt + new) or None."""
    on_history: list[Processor] = []
    if options.repetition_penalty != 1:
        on_history.append(partial(penalize_repetition, penalty=options.repetition_penalty))
    if options.no_repeat_ngram_size:
        on_history.append(partial(ban_repeated_ngrams, n=options.no_repeat_ngram_size))
    if words := [word for word in options.bad_words_ids or () if list(word) not in [[token] for token in options.eos]]:
        on_history.append(partial(ban_words, words=words))

    given = options.logits_processor or []
    given = [given] if callable(given) else list(given)

    warpers: list[Callable[[Tensor], Tensor]] = []
    # a beam must be able to go on when its likeliest tokens end it
    at_least = 1 if options.num_beams == 1 else max(2, 1 + len(options.eos))
    if options.temperature != 1:
        warpers.append(lambda scores: scores / options.temperature)
    if options.top_k:
        warpers.append(partial(keep_top_k, k=max(options.top_k, at_least)))
    if options.top_p is not None and options.top_p < 1:
        warpers.append(partial(keep_top_p, p=options.top_p, at_least=at_least))
    if options.min_p:
        warpers.append(partial(keep_min_p, p=options.min_p, at_least=at_least))

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        # padding is no token, so that a row gets what it would get alone
        history = ids if mask is None or not on_history else ids.masked_fill(mask[:, : ids.size(1)] == 0, -1)
        for processor in on_history:
            scores = processor(history, scores)
        if ids.size(1) - prompt_length < options.min_new_tokens and options.eos:
            scores = scores.index_fill(1, ids.new_tensor(options.eos), BANNED)
        for processor in given:
            scores = processor(ids, scores)
        for warper in warpers:
            scores = warper(scores)
        return scores

    return process


# ---------------------------------------------------------------------------------------------------------------------
# Random choices


def gumbel_noise(like: Tensor, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """Independent draws from Gumbel(0, 1): -log E of E ~ Exp(1). like (N, V); generators are one, or one a row."""
    if isinstance(generator, Sequence):
        return torch.cat([gumbel_noise(row[None], one) for row, one in zip(like, generator, strict=True)])
    return -torch.empty_like(like).exponential_(generator=generator).log()


def draw(scores: Tensor, count: int, generator: Generator | Sequence[Generator] | None, gumbel: bool = False) -> Tensor:
    """`count` different tokens of each row, in the order drawn: (N, V) -> (N, count), from softmax(scores).

    With `gumbel`, by the highest of score + Gumbel noise, which has the same distribution (Maddison et al. 2014; its
    top k are k draws without replacement, Kool et al. 2019).
    """
    if gumbel:
        return (scores + gumbel_noise(scores, generator)).topk(count).indices
    if isinstance(generator, Sequence):
        rows = zip(scores.split(1), generator, strict=True)
        return torch.cat([draw(row, count, one) for row, one in rows])
    return torch.multinomial(scores.softmax(dim=-1), count, generator=generator)


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
    """Relaxed samples that gradients flow through: softmax((logits + Gumbel noise) / temperature), each fed back as the
    mixture of token embeddings that it is (Jang et al. 2017; Texar's GumbelSoftmaxEmbeddingHelper).

    input_ids (B, T), attention_mask (B, T), left-padded. With `hard` the values are one-hot and the gradient is that of
    the soft sample (straight-through). Every step reads all again: a gradient needs what a cache forgets.

    Returns: (B, max_new_tokens, V), each row of V summing to 1.
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


# ---------------------------------------------------------------------------------------------------------------------
# Reading and stopping


class PackedLinear(nn.Module):
    """x Wᵀ + b on CPU, with W laid out as oneDNN's kernels read it: F.linear lays it out anew for every token."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class DecodingHead(nn.Module):
    """Hidden states (N, C) -> logits (N, V) in float32, from a product in the weights' dtype: see `centered_head`."""

    def __init__(self, weight: Tensor, *, pack: bool) -> None:
        super().__init__()
        head = centered_head(weight.detach(), weight.dtype)
        self.product = PackedLinear(head, None) if pack else partial(F.linear, weight=head)
        # what centered_head has taken away
        self.mean = None if weight.dtype == torch.float32 else weight.detach().mean(dim=0, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.product(x).float()
        return logits if self.mean is None else logits + (x.float() @ self.mean).unsqueeze(1)


def pack_weights(model: GPT) -> None:
    """Prepare a model for decoding, in place: `DecodingHead`, and weights laid out for a CPU that oneDNN knows.

    For models that only decode from here on: they can be neither trained, saved nor moved.
    """
    weight = model.transformer.wte.weight
    pack = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if weight.dtype != torch.float32:
        pack = pack and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    linears = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    for module, name, child in linears if pack else ():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias))
    model.add_module("decoding_head", DecodingHead(weight, pack=pack))


class Reader:
    """Has the model read what is new in the rows, and remembers the rest in its cache.

    Beyond block_size the model sees the last block_size tokens. As its positions are learned ones, every token that
    moves along gets another key and value: nothing can be remembered, and each step reads the whole window.
    """

    def __init__(self, model: GPT, ids: Tensor, mask: Tensor | None, options: Options) -> None:
        self.model, self.mask, self.options = model, mask, options
        length = ids.size(1) + options.max_new_tokens - 1  # the last token is not read
        self.cache = model.new_cache(len(ids), min(length, model.config.block_size))
        self.head = model._modules.get("decoding_head")  # of pack_weights
        self.checked = False

    def __call__(self, ids: Tensor) -> tuple[Tensor, GPTOutput]:
        """ids (N, T) -> logits (N, V) of the token after the last, in fp32, and the model's output.

        ValueError where the first logits are NaN.
        """
        first = max(0, ids.size(1) - self.model.config.block_size)
        if first:
            self.cache.crop(0)
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
        if not self.checked and logits.isnan().any():
            raise ValueError(
                "the model's logits are NaN: its weights are damaged, or overflow in this dtype: take another "
                "checkpoint, or float32"
            )
        self.checked = True
        return logits, output


def empty_records(options: Options) -> dict[str, Any]:
    """A list for each output that the options ask for, to be filled by `record` at every step."""
    names = ("logits", "scores", "hidden_states", "attentions")
    return {name: [] for name in names if getattr(options, f"output_{name}")}


def record(records: dict[str, Any], logits: Tensor, scores: Tensor, output: GPTOutput) -> None:
    values = output._asdict() | {"logits": logits, "scores": scores}
    for name, steps in records.items():
        steps.append(values[name])


def ends_with_stop_string(ids: Sequence[int], stop_strings: Sequence[str], tokenizer: Tokenizer) -> bool:
    """Whether the last token completes a stop string, even if that token goes on after it."""
    tail = ids[-max(len(stop.encode()) for stop in stop_strings) :]  # a token is at least a byte
    text, before = tokenizer.decode(tail), tokenizer.decode(tail[:-1]).rstrip("\ufffd")
    found = [text.rfind(stop) + len(stop) for stop in stop_strings if stop in text]
    return any(end > len(before) for end in found)


def find_ended(ids: Tensor, options: Options) -> Tensor:
    """Which rows of ids (N, T) end with their last token: (N,) booleans."""
    ended = torch.isin(ids[:, -1], ids.new_tensor(options.eos))
    if options.stop_strings:
        stops = [options.stop_strings] if isinstance(options.stop_strings, str) else options.stop_strings
        by_text = [ends_with_stop_string(row, stops, options.tokenizer) for row in ids.tolist()]
        ended |= torch.tensor(by_text, device=ids.device)
    return ended


# ---------------------------------------------------------------------------------------------------------------------
# The two loops


class Step(NamedTuple):
    tokens: Tensor  # (N,)
    logits: Tensor  # (N, V)
    scores: Tensor  # (N, V)
    output: GPTOutput
    running: Tensor  # (N,) booleans: rows that had not ended before this token
    is_last: bool


@torch.no_grad()
def sample_steps(model: GPT, ids: Tensor, mask: Tensor | None, options: Options) -> Iterator[Step]:
    """Greedy decoding and sampling: one new token for each row of ids (N, T) at a time."""
    rows, prompt_length = ids.shape
    length = prompt_length + options.max_new_tokens
    read = Reader(model, ids, mask, options)
    process = make_process(options, prompt_length, mask)
    may_ban_all = options.no_repeat_ngram_size or options.bad_words_ids or options.logits_processor
    running = torch.ones(rows, dtype=torch.bool, device=ids.device)
    ids = F.pad(ids, (0, options.max_new_tokens))
    for t in range(prompt_length, length):
        logits, output = read(ids[:, :t])
        scores = process(ids[:, :t], logits)
        if may_ban_all and (scores[running] == BANNED).all(dim=-1).any():
            raise ValueError(f"no token is left to choose at position {t}: all are banned")
        if options.do_sample:
            # of a row that has ended nothing may be left to draw
            choices = scores.masked_fill(~running[:, None], 0.0) if may_ban_all else scores
            tokens = draw(choices, 1, options.generator, options.gumbel)[:, 0]
        else:
            tokens = scores.argmax(dim=-1)
        was_running, is_last = running, t + 1 == length
        if options.eos:
            tokens = tokens.where(running, options.eos[0])
        ids[:, t] = tokens
        if options.eos:
            running = running & ~find_ended(ids[:, : t + 1], options)
            is_last = is_last or not running.any()
        yield Step(tokens, logits, scores, output, was_running, is_last)
        if is_last:
            return


NEVER = -1.0e9  # score of a beam that must not win; finite, as scores are added and compared


class Beams(NamedTuple):
    """Some hypotheses for each of B prompts, best first."""

    scores: Tensor  # (B, K) summed log-probabilities, of finished ones / (new tokens ** length_penalty)
    ids: Tensor  # (B, K, prompt + new)
    logprobs: Tensor  # (B, K, new) of each token under the model alone
    origins: Tensor  # (B, K, new) the row of the batch that each token was chosen in, -1 where there is none yet

    def take(self, which: Tensor) -> Beams:
        """which (B, k): for each prompt the hypotheses to keep, in order."""
        prompts = torch.arange(len(which), device=which.device)[:, None]
        return Beams(*(tensor[prompts, which] for tensor in self))

    def join(self, other: Beams) -> Beams:
        return Beams(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))


@torch.no_grad()
def beam_search(model: GPT, ids: Tensor, mask: Tensor | None, options: Options) -> GenerateOutput:
    """Keep the num_beams likeliest continuations of each prompt at every step; return the best finished ones.

    ids (B, T), mask (B, prompt + new) or None. The rules are those of transformers' `_beam_search`: of the candidates
    for a step, a beam times a token each, those that end join the finished ones if they are among the best num_beams,
    and the best num_beams of the others run on.
    """
    (n_prompts, prompt_length), K, V = ids.shape, options.num_beams, model.config.vocab_size
    length = prompt_length + options.max_new_tokens
    mask = None if mask is None else mask.repeat_interleave(K, dim=0)
    read = Reader(model, ids.repeat_interleave(K, dim=0), mask, options)
    process = make_process(options, prompt_length, mask)

    fill = options.eos[0] if options.eos else 0
    blank = torch.zeros(n_prompts, K, options.max_new_tokens, device=ids.device)
    start = F.pad(ids, (0, options.max_new_tokens), value=fill)[:, None].expand(-1, K, -1)
    finished = Beams(torch.full((n_prompts, K), NEVER, device=ids.device), start, blank, blank.long() - 1)
    running = finished._replace(scores=finished.scores.index_fill(1, ids.new_tensor([0]), 0.0))  # they begin as one
    improvable = torch.ones(n_prompts, 1, dtype=torch.bool, device=ids.device)
    first_row = torch.arange(n_prompts, device=ids.device)[:, None] * K
    n_candidates = min(max(2, 1 + len(options.eos)) * K, K * V)  # so that K can run on if the others end
    records = empty_records(options)

    for t in range(prompt_length, length):
        rows = running.ids[:, :, :t].flatten(0, 1)  # (B * K, t)
        logits, output = read(rows)
        logprobs = logits.log_softmax(dim=-1)
        scores = process(rows, logprobs)
        record(records, logits, scores, output)

        totals = (running.scores[:, :, None] + scores.view(n_prompts, K, V)).flatten(1)  # (B, K * V)
        if options.do_sample:
            chosen = draw(totals, n_candidates, options.generator, gumbel=True)  # also where few tokens are allowed
        else:
            chosen = totals.topk(n_candidates).indices
        parents, tokens = chosen // V, chosen % V
        candidates = running.take(parents)._replace(scores=totals.gather(1, chosen))
        new = t - prompt_length
        candidates.ids[:, :, t] = tokens
        candidates.logprobs[:, :, new] = logprobs.view(n_prompts, -1).gather(1, chosen)
        candidates.origins[:, :, new] = first_row + parents
        ended = torch.ones_like(tokens, dtype=torch.bool)
        if t + 1 < length:
            ended = find_ended(candidates.ids[:, :, : t + 1].flatten(0, 1), options).view_as(tokens)

        alive = candidates.scores + NEVER * ended
        running = candidates._replace(scores=alive).take(alive.topk(K).indices)

        is_full = (finished.scores > NEVER / 2).all(dim=1, keepdim=True)
        may_finish = ended & improvable & ~(is_full & (options.early_stopping is True))
        may_finish[:, K:] = False
        final = candidates.scores / (new + 1) ** options.length_penalty + NEVER * ~may_finish
        both = finished.join(candidates._replace(scores=final))
        finished = both.take(both.scores.topk(K).indices)

        # could the best running beam still beat the worst finished one?
        is_full = (finished.scores > NEVER / 2).all(dim=1, keepdim=True)
        patient = options.early_stopping == "never" and options.length_penalty > 0
        final_length = options.max_new_tokens if patient else new + 1
        hope = running.scores[:, :1] / final_length**options.length_penalty
        improvable &= ~is_full | (hope > finished.scores[:, -1:])
        if not improvable.any() or ended.all() or (options.early_stopping is True and is_full.all()):
            break
        read.cache.reorder(running.origins[:, :, new].flatten())

    best = Beams(*(tensor[:, : options.num_return_sequences].flatten(0, 1) for tensor in finished))
    lengths = (best.origins >= 0).sum(dim=1)
    summed = best.scores * lengths.clamp(min=1) ** options.length_penalty  # as it was before the length divided it
    if (torch.minimum(best.scores, summed) < NEVER / 2).any():
        raise ValueError(
            f"some prompt has fewer than {options.num_return_sequences} continuations, so much is banned: ban less, or "
            f"ask for fewer num_return_sequences"
        )
    steps = int(lengths.max())
    return GenerateOutput(
        best.ids[:, : prompt_length + steps],
        best.logprobs[:, :steps],
        best.scores,
        lengths,
        beam_indices=best.origins[:, :steps],
        **records,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The front door


def left_pad(prompts: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and attention mask (B, T) of prompts of different lengths, padded on the left with `fill`."""
    if any(isinstance(prompt, int) for prompt in prompts):
        raise ValueError("one list of ids was given, expected a list of such lists, one for each prompt")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token, and there must be a prompt")
    length = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[fill] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def prepare(
    model: GPT, input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Check it all once; returns ids (N, T) on the model's device and a mask (N, prompt + new) if ragged."""
    config = model.config
    options.check(config.vocab_size)
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise ValueError("a list of prompts is padded and masked here: give no attention_mask with it")
        input_ids, attention_mask = left_pad(input_ids, fill=options.eos[0] if options.eos else 0)
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}, expected (batch, tokens), both at least 1")
    low, high = (int(value) for value in input_ids.aminmax())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"input_ids hold {low if low < 0 else high}, outside 0..{config.vocab_size - 1}")
    prompt_length = input_ids.size(1)
    if prompt_length + options.max_new_tokens > config.block_size and not options.sliding:
        raise ValueError(
            f"{prompt_length} prompt tokens + {options.max_new_tokens} new > block_size {config.block_size}: "
            f"ask for fewer or shorten the prompt (in Python, sliding=True reads the last {config.block_size} only)"
        )
    mask = attention_mask
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}")
        if not mask[:, -1].all():
            raise ValueError("attention_mask ends with 0: prompts are to be padded on the left")
        mask = None if mask.all() else F.pad(mask, (0, options.max_new_tokens), value=1)
    copies = options.num_return_sequences if options.num_beams == 1 else 1
    if isinstance(options.generator, Sequence) and len(options.generator) != len(input_ids) * copies:
        raise ValueError(f"got {len(options.generator)} generators: give one, or {len(input_ids) * copies}, one a row")
    device = model.transformer.wte.weight.device
    ids, mask = (None if x is None else x.repeat_interleave(copies, dim=0).to(device) for x in (input_ids, mask))
    assert ids is not None
    return ids, mask


@torch.no_grad()
def generate(
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
    """Continue each prompt by up to `max_new_tokens` tokens; greedily, unless do_sample or num_beams > 1.

    Args:
        model: in eval mode.
        input_ids: (B, T), ragged ones padded on the left, or a list of token lists, which is padded here.
        attention_mask: (B, T), 0 for padding.
        do_sample: draw from the distribution, of scores divided by `temperature`, of which only the `top_k` likeliest,
            then the likeliest that together reach `top_p`, then those at least `min_p` times as likely as the first are
            kept. With `gumbel` by the Gumbel-max trick: other draws, the same distribution.
        num_beams: beams kept for each prompt; hypotheses compare by log-probability / (new tokens ** length_penalty).
        early_stopping: True ends a prompt's search when num_beams hypotheses are finished; False also when no running
            beam is likely to beat the worst of them at its present length; "never" when none can at full length.
        repetition_penalty, no_repeat_ngram_size, bad_words_ids: see the processors above. Prompts count.
        min_new_tokens: eos is banned before.
        stop_strings: text that ends a row when it appears, with the `tokenizer` that shows it.
        num_return_sequences: results of each prompt, next to each other.
        sliding: allow more tokens than block_size; the model then sees the last block_size tokens.
        eos_token_id: ends a row, which then holds (the first) eos to its end. None: only the length does; with
            stop_strings it is the tokenizer's end-of-text.
        generator: one for all draws, or one for each of the B * num_return_sequences rows, so that a row does not
            depend on its neighbours (in beam search, of the B prompts). On the model's device.
        logits_processor: called as (ids, scores) -> scores, after the others and before temperature.
        output_...: what a GenerateOutput holds besides; needs return_dict.

    Returns:
        (B * num_return_sequences, T + new) ids, prompt and padding included, or with return_dict a GenerateOutput.
        `new` is less than max_new_tokens when all rows have ended before.

    Raises:
        ValueError: an impossible option, ids outside the vocabulary, or more tokens than fit.
    """
    options = Options(**locals())
    ids, mask = prepare(model, input_ids, attention_mask, options)
    if options.num_beams > 1:
        output = beam_search(model, ids, mask, options)
        return output if return_dict else output.sequences
    records = empty_records(options)
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    lengths = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    for step in sample_steps(model, ids, mask, options):
        tokens.append(step.tokens)
        lengths += step.running
        if return_dict:
            record(records, step.logits, step.scores, step.output)
            chosen = -F.cross_entropy(step.logits, step.tokens, reduction="none")
            logprobs.append(chosen.where(step.running, 0.0))
    sequences = torch.cat((ids, torch.stack(tokens, dim=1)), dim=1)
    if not return_dict:
        return sequences
    of_tokens = torch.stack(logprobs, dim=1)
    sequences_scores = of_tokens.sum(dim=1) / lengths**length_penalty
    return GenerateOutput(sequences, of_tokens, sequences_scores, lengths, **records)


def read_options(**given: Any) -> Options:
    """The Options for these keyword arguments of `generate` and its defaults for the others."""
    arguments = inspect.signature(generate).bind(None, None, **given)
    arguments.apply_defaults()
    return Options(**arguments.kwargs)


class Piece(NamedTuple):
    token: int
    text: str  # whole characters; empty while one is incomplete


def stream(
    model: GPT, tokenizer: Tokenizer, prompt: str | Sequence[int], *, max_new_tokens: int, **options: Any
) -> Iterator[Piece]:
    """Yield each new token as soon as it is chosen, with the text that it completes; eos has none.

    Takes the options of `generate` but beams, and one prompt. The texts, joined, are the decoded continuation.
    """
    chosen = read_options(max_new_tokens=max_new_tokens, tokenizer=tokenizer, **options)
    if chosen.num_beams > 1 or chosen.num_return_sequences > 1:
        raise ValueError("only one sequence can be streamed: set num_beams and num_return_sequences to 1")
    # checked now, not when the first token is asked for
    ids, mask = prepare(model, [encode_prompt(tokenizer, prompt)], None, chosen)
    return _stream_pieces(model, tokenizer, ids, mask, chosen)


def _stream_pieces(
    model: GPT, tokenizer: Tokenizer, ids: Tensor, mask: Tensor | None, options: Options
) -> Iterator[Piece]:
    pending: list[int] = []  # tokens of which the last character is incomplete
    for step in sample_steps(model, ids, mask, options):
        token = int(step.tokens[0])
        if token not in options.eos:
            pending.append(token)
        text = tokenizer.decode(pending)
        if text.endswith("\ufffd") and not step.is_last:
            text = ""
        else:
            pending = []
        yield Piece(token, text)


class Completion(NamedTuple):
    """A continued prompt; `tokens` and `text` without the prompt and without eos."""

    prompt: str
    text: str
    tokens: list[int]
    logprobs: list[float]  # of `tokens`, under the model alone
    finish_reason: Literal["stop", "length"]


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt; of an empty one end-of-text, which in training comes before every document."""
    return (tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)) or [tokenizer.eot]


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
    """Continue any number of prompts, in batches of up to `batch_size` of about one length; results in order.

    With num_return_sequences each prompt has that many results, next to each other. A `seed` gives result i (in beam
    search those of prompt i) the generator seed + i, so that in float32 results do not depend on the batches; bfloat16
    rounds differently in batches of another size. eos_token_id is the tokenizer's end-of-text if not
    given. `progress` is called after each batch with the number of prompts in it. Other options are `generate`'s.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one string, expected a list of them")
    options = {"eos_token_id": tokenizer.eot, "tokenizer": tokenizer, **options, "return_dict": True}
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]), reverse=True)  # what does not fit fails first
    chosen = read_options(**options)
    copies, by_prompt = chosen.num_return_sequences, chosen.num_beams > 1
    device = model.transformer.wte.weight.device
    results: dict[int, Completion] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        numbers = [i * copies + copy for i in batch for copy in range(copies)]
        if seed is not None:
            seeds = batch if by_prompt else numbers
            options["generator"] = [Generator(device).manual_seed(seed + number) for number in seeds]
        out = generate(model, [encoded[i] for i in batch], **options)
        assert isinstance(out, GenerateOutput)
        new_ids = out.sequences[:, out.sequences.size(1) - out.logprobs.size(1) :]
        rows = zip(numbers, new_ids.tolist(), out.logprobs.tolist(), out.lengths.tolist(), strict=True)
        for number, tokens, logprobs, length in rows:
            prompt = prompts[number // copies]
            ended = bool(find_ended(torch.tensor([encoded[number // copies] + tokens[:length]]), chosen))
            length -= tokens[length - 1] in chosen.eos
            text = tokenizer.decode(tokens[:length])
            reason: Literal["stop", "length"] = "stop" if ended else "length"
            results[number] = Completion(prompt, text, tokens[:length], logprobs[:length], reason)
        if progress is not None:
            progress(len(batch))
    return [results[number] for number in range(len(prompts) * copies)]
