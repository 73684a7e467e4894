"""HellaSwag (Zellers et al. 2019): choose the correct one of four endings of a short text.

The metric acc takes the ending with the highest log-probability as the model's answer. For acc_norm, each
log-probability is first divided by the length of the ending. Two conventions are in use. They give different
accuracies, so every result names its convention:

- "completion", as in build-nanogpt: the context is unchanged, each ending follows after a space, and the length of an
  ending is its number of tokens.
- "harness", as in lm-evaluation-harness: the activity label precedes the context, the second part of the context is
  capitalized, the bracketed marks of WikiHow are removed, and the length of an ending is its number of characters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from data.tokenizer import Tokenizer
from eval.choices import Answers, Convention, Question, answer, make_questions, mean_and_stderr, same_context
from eval.likelihood import check_pair, log_likelihoods
from eval.rows import read_rows


def completion(row: dict[str, Any]) -> Question:
    """Return the question of a row in the convention "completion"."""
    return same_context(row["ctx"], row["endings"], int(row["label"]))


def harness(row: dict[str, Any]) -> Question:
    """Return the question of a row in the convention "harness" (lm-evaluation-harness, tasks/hellaswag)."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return same_context(_clean(context), [_clean(ending) for ending in row["endings"]], int(row["label"]))


def _clean(text: str) -> str:
    # Texts from WikiHow still contain its marks, such as [title] and [step].
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


RENDERERS = {"completion": completion, "harness": harness}


@functools.lru_cache(maxsize=4)
def read_questions(convention: Convention) -> list[Question]:
    """Read the 10,042 questions of the validation set, in the order of the dataset."""
    rows = read_rows("hellaswag/none/validation")
    return make_questions("hellaswag", rows, RENDERERS[convention])


def hellaswag_metrics(answers: Answers, convention: Convention) -> dict[str, Any]:
    """Return acc and acc_norm with their standard errors, in the form that the function `hellaswag` (below) returns."""
    acc, acc_stderr = mean_and_stderr(answers.choice == answers.gold)
    acc_norm, acc_norm_stderr = mean_and_stderr(answers.choice_norm == answers.gold)
    return {
        "convention": convention,
        "acc": acc,
        "acc_stderr": acc_stderr,
        "acc_norm": acc_norm,
        "acc_norm_stderr": acc_norm_stderr,
        "count": len(answers.gold),
    }


def hellaswag(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    convention: Convention = "completion",
    limit: int | None = None,
    batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a model during training. The ranks divide the questions, and all ranks return the same metrics.

    The caller chooses the device and enables autocast. The model is set to eval mode and back to its previous mode.

    Args:
        convention: "completion" or "harness", as the module's docstring describes.
        limit: evaluate only the first `limit` questions; None means all.
        batch_size: sequences per forward pass; None means 8 on CPU and 64 elsewhere.
        rank, world_size, reduce: see `eval.likelihood.log_likelihoods`.

    Returns {"convention", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "count"}.
    Raises ValueError if model and tokenizer do not match or the logits are not finite, OSError if the questions cannot
    be downloaded.
    """
    check_pair(model, tokenizer)
    score = functools.partial(
        log_likelihoods, model, batch_size=batch_size, rank=rank, world_size=world_size, reduce=reduce
    )
    return hellaswag_metrics(answer(read_questions(convention)[:limit], tokenizer, score, convention), convention)
