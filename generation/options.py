"""The options and the result of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple, Protocol

from torch import Generator, Tensor

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids (N, T), scores (N, V)) -> scores (N, V), as in transformers


class Tokenizer(Protocol):
    """The methods and attributes of a tokenizer that `generate` and the other functions of this package use."""

    eot: int  # id of the end-of-text token
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The options of `generate` (generation/decode.py), whose docstring explains them.

    Raises:
        ValueError: an option has an impossible value, or two options cannot be combined.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    min_new_tokens: int = 0
    stop_strings: str | Sequence[str] | None = None
    stop_in_prompt: bool = True
    num_return_sequences: int = 1
    gumbel: bool = False
    sliding: bool = False
    eos_token_id: int | Sequence[int] | None = None
    generator: Generator | Sequence[Generator] | None = None
    logits_processor: Processor | Sequence[Processor] | None = None
    tokenizer: Tokenizer | None = None
    return_dict: bool = False
    output_logits: bool = False
    output_scores: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "temperature must be above 0 (for greedy decoding set do_sample=False)": 0 < self.temperature < inf,
            "temperature must be at least 1e-30, because scores divided by less overflow": self.temperature >= 1e-30,
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
            raise ValueError("temperature, top_k, top_p, min_p and gumbel affect only sampling: set do_sample=True")
        if self.num_beams == 1 and self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError("greedy decoding has one result per prompt: for several, set do_sample=True or num_beams")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(f"num_return_sequences ({self.num_return_sequences}) exceeds num_beams ({self.num_beams})")
        if self.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need a tokenizer, which decodes the tokens to text")
        if self.stop_strings and not all(self.stop_strings):
            raise ValueError("stop_strings contain an empty string, which would end every text at once: remove it")

    def n_choices(self, vocab_size: int) -> int:
        """Return the number of token ids that may be chosen: `vocab_size`, or `tokenizer.vocab_size` if smaller."""
        return vocab_size if self.tokenizer is None else min(vocab_size, self.tokenizer.vocab_size)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise ValueError if a token id in the options is outside the vocabulary, or a banned word has no tokens."""
        words = [token for word in self.bad_words_ids or () for token in word or (-1,)]
        if not all(0 <= token < vocab_size for token in (*words, *self.eos)):
            raise ValueError(
                f"bad_words_ids and eos_token_id must contain ids in 0..{vocab_size - 1}, and no word may be empty"
            )

    @property
    def eos(self) -> list[int]:
        """The tokens that end a row; empty if no token does. The first of them fills the rest of an ended row."""
        if self.eos_token_id is None:
            return [self.tokenizer.eot] if self.stop_strings and self.tokenizer else []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)


class GenerateOutput(NamedTuple):
    """The result of `generate` with return_dict=True. Outputs that were not requested are None.

    B is the number of prompts, N is B * num_return_sequences, and S is the number of new tokens of the longest row. In
    beam search, however, the fields that are lists have one entry for each step of the search (S or more), and the
    tensors in these lists have B * num_beams rows.
    """

    sequences: Tensor  # (N, prompt + S); filled with eos after the end of a row
    logprobs: Tensor  # (N, S), log-probability of each new token, from the unprocessed logits; 0 after the end of a row
    # (N,), the score of each row: the sum of `logprobs` (in beam search, of the processed log-probabilities) divided by
    # `lengths` ** length_penalty.
    sequences_scores: Tensor
    lengths: Tensor  # (N,), number of new tokens of each row, including the token that ended it
    logits: list[Tensor] | None = None  # S tensors (N, V), float32, unprocessed
    scores: list[Tensor] | None = None  # S tensors (N, V): processed logits (beam search: log-probabilities)
    # S tuples of n_layer + 1 tensors (N, tokens that the step reads, C). Step 0 reads the whole prompt.
    hidden_states: list[tuple[Tensor, ...]] | None = None
    # S tuples of n_layer tensors (N, H, tokens that the step reads, tokens so far).
    attentions: list[tuple[Tensor, ...]] | None = None
    # (N, S), only in beam search: for each new token, the row of its step's `scores` tensor that it was chosen from; -1
    # after the end of a row.
    beam_indices: Tensor | None = None
