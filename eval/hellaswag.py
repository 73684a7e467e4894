"""HellaSwag (Zellers et al. 2019): which of four endings follows?

Two conventions are in use and their figures differ, so every result names its own:

- "completion", as in build-nanogpt: the context as given, an ending after a space, normalised by tokens;
- "harness", as in lm-evaluation-harness: the activity label before the context, its second part capitalised, WikiHow's
  brackets cleaned up, normalised by characters.

The released 124M has acc 0.2859, acc_norm 0.2955 in the first and 0.2892, 0.3114 in the second (eval/reference.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from data.tokenizer import Tokenizer
from eval.choices import Answers, Convention, Question, answer, build, mean_and_stderr, read_rows, same_context
from eval.likelihood import check_pair, log_likelihoods


def completion(row: dict[str, Any]) -> Question:
    """A row of the data set in the completion convention."""
    return same_context(row["ctx"], row["endings"], int(row["label"]))


def harness(row: dict[str, Any]) -> Question:
    """A row of the data set as lm-evaluation-harness' tasks/hellaswag has it."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return same_context(_clean(context), [_clean(ending) for ending in row["endings"]], int(row["label"]))


def _clean(text: str) -> str:
    # WikiHow's articles left [title], [step] and the like behind.
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


RENDER = {"completion": completion, "harness": harness}


@functools.lru_cache(maxsize=4)
def read_questions(convention: Convention) -> list[Question]:
    """The 10,042 questions of the validation set, in the order of the data."""
    rows = read_rows("hellaswag/none/validation")
    return build("hellaswag", rows, RENDER[convention])


def summarize(answers: Answers, convention: Convention) -> dict[str, Any]:
    """Accuracies with their standard errors."""
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
    """Evaluate a model that is being trained: every rank takes a share, and all get the same figures.

    Args:
        model: on the device to compute on, under the autocast to compute in. It is in eval mode meanwhile.
        limit: the first so many questions only.
        batch_size: sequences a forward pass; None chooses. See `eval.likelihood.log_likelihoods` for this and for
            `rank`, `world_size` and `reduce`, which sums a tensor over the ranks in place.

    Returns {"convention", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "count"}.
    Raises ValueError when model and tokenizer do not belong together or logits are not finite, OSError when the
    questions cannot be fetched.
    """
    check_pair(model, tokenizer)
    score = functools.partial(
        log_likelihoods, model, batch_size=batch_size, rank=rank, world_size=world_size, reduce=reduce
    )
    return summarize(answer(read_questions(convention)[:limit], tokenizer, score, convention), convention)
