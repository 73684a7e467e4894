"""Part 8 of the GPU check: decoding compared with transformers, and scoring of questions as long as HellaSwag's."""

from __future__ import annotations

import random
import statistics
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

import generation.fixed_step
from benchmarks.clock import seconds
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, QUESTIONS
from device import autocast
from eval.likelihood import Request, log_likelihoods
from generation import generate, pack_weights
from model import GPT
from scripts.gpu_check.parity import make_twins
from scripts.gpu_check.report import Report, Settings

# Batch size -> lowest allowed ratio of our decoding speed to that of transformers.
DECODING_GOAL = {1: 4.0, 8: 3.0}


def check_inference(settings: Settings, report: Report) -> None:
    """Compare our speed of decoding with that of transformers, check the CUDA graph of decoding, and time scoring."""
    new = 20 if settings.tiny else NEW_TOKENS
    theirs, ours = make_twins(settings.shape, 0.02, settings.device)
    theirs.to(settings.dtype)
    pack_weights(ours.to(settings.dtype), rows=64)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    rows: list[dict[str, Any]] = []
    for batch in (1, 8, 64):
        report.say(f"decoding {new} tokens at batch {batch}")
        ids = torch.randint(settings.shape.vocab_size, (batch, PROMPT_TOKENS), device=settings.device)
        our_rate = rate(partial(generate, ours, ids, max_new_tokens=new), batch * new)
        their_rate = rate(partial(theirs.generate, ids, attention_mask=torch.ones_like(ids), **options), batch * new)
        names = ("batch", "ours, tokens/s", "transformers, tokens/s", "ratio")
        rows.append(dict(zip(names, (batch, our_rate, their_rate, our_rate / their_rate), strict=True)))
    report.table(f"greedy decoding, {settings.dtype}", rows)
    for row in rows if settings.is_timed else ():
        ratio, goal = row["ratio"], DECODING_GOAL.get(row["batch"], 0.0)
        found = f"{ratio:.2f}x transformers, at least {goal:g}x"
        report.check(f"decoding at batch {row['batch']}", ratio >= goal, found)
    if settings.device == "cuda":
        check_graph(ours, settings, report)
    score_questions(settings, report)


def rate(work: partial, tokens: int) -> float:
    """Return the tokens per second, from the median duration of three calls after one warm-up call."""
    return tokens / statistics.median([seconds(work) for _ in range(4)][1:])


def check_graph(model: GPT, settings: Settings, report: Report) -> None:
    """Check that decoding replays a CUDA graph, and that it gives the same tokens as decoding without the graph."""
    ids = torch.randint(settings.shape.vocab_size, (4, PROMPT_TOKENS), device=settings.device)
    new = min(64, settings.tokens // 2)
    captured: list[Any] = []
    capture = generation.fixed_step.capture_graph

    def record(*arguments: Any) -> Any:
        captured.append(capture(*arguments))
        return captured[-1]

    with patch.object(generation.fixed_step, "capture_graph", record):
        with_graph = generate(model, ids, max_new_tokens=new)
    report.check("decoding replays a CUDA graph", len(captured) == 1, f"{len(captured)} captured")
    with patch.object(generation.fixed_step, "capture_graph", side_effect=RuntimeError("not wanted here")):
        without = generate(model, ids, max_new_tokens=new)
    assert isinstance(with_graph, torch.Tensor)
    assert isinstance(without, torch.Tensor)
    report.check("a CUDA graph gives the same tokens", torch.equal(with_graph, without), f"{with_graph.numel()} tokens")


def score_questions(settings: Settings, report: Report) -> None:
    """Time the scoring of questions with four endings each. Compare the scores of two questions with those in float32.

    The tokens are random. The questions and the endings are about as long as those of HellaSwag.
    """
    torch.manual_seed(0)
    model = GPT(settings.shape).to(settings.device).eval()
    chance, limit = random.Random(0), settings.tokens // 8
    questions = 4 if settings.tiny else 8 * QUESTIONS

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(settings.shape.vocab_size) for _ in range(count))

    requests = []
    for _ in range(questions):
        context = tokens(chance.randint(limit // 4, limit))
        requests += [Request(context, tokens(chance.randint(5, 40 if limit > 40 else 8))) for _ in range(4)]
    report.say(f"scoring {questions} questions")

    def score() -> Any:
        with autocast(torch.device(settings.device), settings.dtype):
            return log_likelihoods(model, requests)

    found = score().log_probs
    duration = statistics.median(seconds(score) for _ in range(3))
    report.table("questions of HellaSwag's length", [{"questions": questions, "questions/s": questions / duration}])
    plain = log_likelihoods(model, requests[:8], batch_size=1).log_probs
    difference = float(abs(found[:8] / plain - 1).max())
    report.at_most(f"scores in {settings.dtype} equal those in float32, relative", difference, 0.02)
