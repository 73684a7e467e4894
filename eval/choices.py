"""Multiple choice by log-likelihood: the model's answer is the choice to which it assigns the highest probability."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from data.tokenizer import Tokenizer
from eval.likelihood import Request, Scorer

# A convention says how a context and a choice become tokens, and how log-probabilities are normalized for the metric
# acc_norm (the accuracy if the model's answer is the choice with the highest normalized log-probability):
# "completion", as in build-nanogpt: context and choice are encoded separately. The log-probability of a choice is
# divided by its number of tokens.
# "harness", as in lm-evaluation-harness: context and choice are encoded as one text, and the tokens are split after the
# context. The log-probability of a choice is divided by its number of characters.
Convention = Literal["completion", "harness"]


@dataclass(frozen=True)
class Question:
    """A question with several choices.

    Attributes:
        contexts: the text before each choice; most tasks have one context and repeat it.
        choices: the possible continuations.
        gold: index of the correct choice.
    """

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


class Answers(NamedTuple):
    """The answers of a model to N questions, chosen by log-probability and by normalized log-probability."""

    gold: np.ndarray  # (N,) index of the correct choice
    choice: np.ndarray  # (N,) index of the choice with the highest log-probability
    choice_norm: np.ndarray  # (N,) index of the choice with the highest normalized log-probability
    scores: list[list[float]]  # for each question, the log-probability of each choice, in nats
    # (N,) -log2 probability of the correct choice, per UTF-8 byte of this choice. None if the tokenizer has changed the
    # text of a correct choice (see `answer`).
    bits_per_byte: np.ndarray | None


def same_context(context: str, choices: Sequence[str], gold: int) -> Question:
    """Return a question whose choices all have the same context. `gold` is the index of the correct choice."""
    return Question((context,) * len(choices), tuple(choices), gold)


def make_questions(
    name: str, rows: Sequence[dict[str, Any]], render: Callable[[dict[str, Any]], Question]
) -> list[Question]:
    """Turn each row into a question with `render`.

    Raises ValueError if there are no rows, or with the number of the first row that lacks a field or has an invalid
    value.
    """
    if not rows:
        raise ValueError(f"{name}: the data has no rows")
    questions = []
    for number, row in enumerate(rows, start=1):
        try:
            question = render(row)
        except KeyError as error:
            raise ValueError(
                f"{name}, row {number}: the field {error} is missing; the row has {', '.join(row)}"
            ) from None
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{name}, row {number} cannot be read: {error}") from None
        if not 0 <= question.gold < len(question.choices):
            raise ValueError(
                f"{name}, row {number}: the index of the correct choice is {question.gold}, expected 0 to "
                f"{len(question.choices) - 1}"
            )
        questions.append(question)
    return questions


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, convention: Convention) -> Request:
    """Encode a context and its continuation. The continuation begins with the space that separates it from the context.

    A context without tokens is replaced by end-of-text.
    """
    if convention == "completion":
        context_ids, continuation_ids = _encode(tokenizer, context), tokenizer.encode(continuation)
    else:
        # As in the harness, spaces at the end of the context are encoded with the continuation, and scored with it.
        stripped = context.rstrip()
        context_ids = _encode(tokenizer, stripped)
        continuation_ids = tokenizer.encode(context + continuation)[len(context_ids) :]
    return Request(tuple(context_ids) or (tokenizer.eot,), tuple(continuation_ids))


@functools.lru_cache(maxsize=64)
def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


@functools.lru_cache(maxsize=1)  # a training run scores the same questions at each evaluation
def make_requests(questions: tuple[Question, ...], tokenizer: Tokenizer, convention: Convention) -> list[Request]:
    """Encode every choice of every question. All choices of the first question come first, then those of the next."""
    return [
        encode_pair(tokenizer, context, " " + choice, convention)
        for question in questions
        for context, choice in zip(question.contexts, question.choices, strict=True)
    ]


def answer(questions: Sequence[Question], tokenizer: Tokenizer, score: Scorer, convention: Convention) -> Answers:
    """Score every choice of every question, and choose the most probable choice of each question.

    If the tokenizer has dropped or replaced a part of a correct choice, bits_per_byte is None, because the number of
    bytes would include text that was not scored.
    """
    requests = make_requests(tuple(questions), tokenizer, convention)
    log_probs = score(requests).log_probs
    ends = np.cumsum([len(question.choices) for question in questions])
    by_question = np.split(log_probs, ends[:-1])
    request = iter(requests)
    chosen, chosen_norm, bits, complete = [], [], [], True
    for question, sums in zip(questions, by_question, strict=True):
        continuations = [next(request).continuation for _ in question.choices]
        n_tokens = [len(continuation) for continuation in continuations]
        lengths = n_tokens if convention == "completion" else [len(choice) for choice in question.choices]
        chosen.append(int(sums.argmax()))
        chosen_norm.append(int((sums / np.maximum(lengths, 1)).argmax()))
        correct = question.choices[question.gold]
        complete = complete and tokenizer.decode(list(continuations[question.gold])).strip() == correct.strip()
        n_bytes = len(correct.encode())
        bits.append(-sums[question.gold] / math.log(2) / max(n_bytes, 1))
    gold = np.array([question.gold for question in questions])
    scores = [sums.tolist() for sums in by_question]
    return Answers(gold, np.array(chosen), np.array(chosen_norm), scores, np.array(bits) if complete else None)


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of N values and the standard error of the mean (from the sample variance; 0 if N is 1)."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def with_shots(
    questions: Sequence[Question], pool: Sequence[Question], shots: int, seed: int, *, leave_one_out: bool = False
) -> list[Question]:
    """Put `shots` solved examples from `pool` before each question, separated by empty lines.

    The examples of a question depend only on the arguments after `questions` and on the index of the question.

    Args:
        leave_one_out: True if `pool` begins with `questions`, in the same order. Then a question is never its own
            example.

    Raises ValueError if the pool is too small.
    """
    available = len(pool) - leave_one_out
    if shots > available:
        raise ValueError(f"{shots} shots were requested, but only {available} examples are available")
    prompted = []
    for number, question in enumerate(questions):
        drawn = random.Random(f"{seed}, {number}").sample(range(available), shots)
        # With leave_one_out, skip the question itself: add 1 to each drawn index that is at least the question's index.
        examples = [pool[i + (leave_one_out and i >= number)] for i in drawn]
        prefix = "".join(f"{shot.contexts[shot.gold]} {shot.choices[shot.gold]}\n\n" for shot in examples)
        contexts = tuple(prefix + context for context in question.contexts)
        prompted.append(Question(contexts, question.choices, question.gold))
    return prompted
