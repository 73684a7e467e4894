"""Classify a text by the words that a language model expects in a blank (Schick and Schütze 2021, arXiv:2001.07676).

A pattern, such as "{text} It was {label}.", turns a text into a text with a blank, the place of {label}. A verbalizer
names the words that stand for each class, such as "good" for the class "positive". The score of a class is the
log-probability of the whole text with the class's word in the blank. If a class has several words, its score is the
mean of the log-probabilities with each of these words (Schick et al. 2020, arXiv:2010.13641).

Different words in the same blank give texts that begin with the same tokens. The log-probability of these tokens is the
same in every score and does not change the softmax of the scores, so it is not computed.

Letters in shapes: N texts, W words of a verbalizer, K classes; T, C and V as in model.py.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data.tokenizer import Tokenizer
from device import autocast
from model import GPT


@dataclass(frozen=True)
class Verbalizer:
    """The words that stand for the classes.

    classes: names of the classes in alphabetical order;
    words: the words of all classes;
    class_of: the index of the class of each word.
    """

    classes: list[str]
    words: list[str]
    class_of: list[int]

    def class_means(self, word_scores: Tensor) -> Tensor:
        """Return the mean score of the words of each class. (N, W) -> (N, K)."""
        class_of = torch.tensor(self.class_of, device=word_scores.device)
        # Not a matrix product: autocast would compute it in 16 bits, and bfloat16 numbers near -300 are 2 apart.
        sums = word_scores.new_zeros(len(word_scores), len(self.classes)).index_add(1, class_of, word_scores)
        return sums / class_of.bincount()


class Cloze(NamedTuple):
    """A text, filled into a pattern once for each word of a verbalizer, with this word in the blank."""

    fillings: list[list[int]]  # W lists of tokens; each list begins with end-of-text
    start: int  # number of tokens at the beginning that are the same in all lists


def read_verbalizer(pairs: Sequence[str]) -> Verbalizer:
    """Return the verbalizer for a list of pairs, each in the form "WORD=CLASS".

    Raises ValueError if a pair is malformed, if two pairs have the same word, or if there are fewer than two classes.
    """
    class_of: dict[str, str] = {}
    for pair in pairs:
        word, equals, label = pair.rpartition("=")
        if not (equals and word.strip() and label):
            raise ValueError(f"--verbalizer {pair!r}: expected WORD=CLASS, such as good=positive")
        if word in class_of:
            raise ValueError(f"--verbalizer {pair!r}: {word!r} already stands for the class {class_of[word]!r}")
        class_of[word] = label
    classes = sorted(set(class_of.values()))
    if len(classes) < 2:
        raise ValueError(f"--verbalizer names {len(classes)} class, expected at least two: add words of another class")
    return Verbalizer(classes, list(class_of), [classes.index(label) for label in class_of.values()])


def check_pattern(pattern: str) -> None:
    """Raise ValueError unless a pattern has {text} once, {label} once, and no other braces."""
    try:
        fields = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(f"--pattern {pattern!r}: {error}; write {{{{ for a brace in the text") from None
    names = sorted(name for _, name, _, _ in fields if name is not None)
    if names != ["label", "text"] or any(format or conversion for _, _, format, conversion in fields):
        raise ValueError(f"--pattern {pattern!r}: expected {{text}} once and {{label}} once, and no other field")


def make_clozes(
    texts: Sequence[str], pattern: str, words: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> list[Cloze]:
    """Return a Cloze for each text: the pattern filled with this text and with each of `words` in turn.

    A text is cut at its end if the filled-in pattern is longer than `max_length` tokens; the number of such texts is
    printed on stderr. Raises ValueError if the pattern with a word is too long even with an empty text.
    """
    clozes, n_cut = [], 0
    for text in texts:
        fillings = _fill(text, pattern, words, tokenizer)
        kept = tokenizer.encode(text)
        n_cut += max(map(len, fillings)) > max_length
        while (excess := max(map(len, fillings)) - max_length) > 0:
            if not kept:
                raise ValueError(f"--pattern {pattern!r} and a word have more than {max_length} tokens: shorten it")
            kept = kept[:-excess]  # empty if the excess is at least len(kept)
            fillings = _fill(tokenizer.decode(kept).rstrip("\ufffd"), pattern, words, tokenizer)
        shortest = min(map(len, fillings))
        columns = enumerate(zip(*fillings, strict=False))
        clozes.append(Cloze(fillings, next((i for i, column in columns if len(set(column)) > 1), shortest)))
    if n_cut:
        print(f"{n_cut:,} of {len(texts):,} texts are too long for {pattern!r} and were cut", file=sys.stderr)
    return clozes


def _fill(text: str, pattern: str, words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    return [[tokenizer.eot, *tokenizer.encode(pattern.format(text=text, label=word))] for word in words]


def class_scores(model: GPT, clozes: Sequence[Cloze], verbalizer: Verbalizer) -> Tensor:
    """Return the score of each class for each text, (N, K), in nats, on the device of the model."""
    device = model.transformer.wte.weight.device
    rows = [(filling, cloze.start) for cloze in clozes for filling in cloze.fillings]
    ids = torch.zeros(len(rows), max(len(filling) for filling, _ in rows), dtype=torch.int64)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, mask, (filling, start) in zip(ids, scored, rows, strict=True):
        row[: len(filling)] = torch.tensor(filling)
        mask[start : len(filling)] = True
    ids, scored = ids.to(device), scored.to(device)
    # Padding on the right needs no mask: attention is causal, so no token attends to the padding after it.
    x = model(ids, return_logits=False).last_hidden_state  # (N * W, T, C), W words for each text
    # The hidden state of a token predicts the next token. Compute logits only where the next token is scored.
    logits = F.linear(x[:, :-1][scored[:, 1:]], model.transformer.wte.weight).float()  # (scored tokens, V)
    log_probs = -F.cross_entropy(logits, ids[:, 1:][scored[:, 1:]], reduction="none")
    sums = torch.zeros(len(rows), device=device).index_add(0, scored.nonzero()[:, 0], log_probs)  # (N * W,)
    return verbalizer.class_means(sums.view(len(clozes), -1))


@torch.no_grad()
def score_all(
    model: GPT, clozes: Sequence[Cloze], verbalizer: Verbalizer, batch_size: int, dtype: torch.dtype
) -> Tensor:
    """Return the score of each class for each text, (N, K), on the CPU. The model is put in eval mode.

    Each batch holds texts of similar length, so that it needs little padding.
    """
    order = sorted(range(len(clozes)), key=lambda i: len(clozes[i].fillings[0]))
    scores = torch.empty(len(clozes), len(verbalizer.classes))
    model.eval()
    with autocast(model.transformer.wte.weight.device, dtype):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            scores[places] = class_scores(model, [clozes[i] for i in places], verbalizer).cpu()
    return scores
