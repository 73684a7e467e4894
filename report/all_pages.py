"""Write all pages about one run. The pages link to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.shards import TOKEN, open_split
from data.tokenizer import load_tokenizer
from pretrained import load_model
from report.model_pages import write_attention_page, write_embeddings_page, write_tokens_page
from report.run_log import dataset_directories, read_run_log
from report.runs_page import write_runs_page

PAGES = ("report", "attention", "tokens", "embeddings")
EXAMPLE_TOKENS = 48  # length of the example text; the labels of a larger attention matrix would not be readable


def write_all_pages(run: Path, checkpoint: str | None, text: str | None) -> None:
    """Write report.html, attention.html, tokens.html and embeddings.html to the directory of a run.

    The pages about attention and tokens show `text`. If it is None, they show the beginning of the validation split.
    `checkpoint` is best, newest or a step. None means best if eval.patience ended the run, otherwise newest.

    Raises ValueError or OSError if the run cannot be read, if there is no text, or if a page cannot be made or written.
    """
    log = read_run_log(run, run.name)
    text = text or example_text(log.config)
    write_runs_page([run], run / "report.html", PAGES)
    model, tokenizer, name = load_model(str(run), checkpoint=checkpoint)
    write_attention_page(model, tokenizer, name, text, run / "attention.html", PAGES)
    write_tokens_page(model, tokenizer, name, text, run / "tokens.html", PAGES)
    write_embeddings_page(model, name, run / "embeddings.html", PAGES)


def example_text(config: dict[str, Any]) -> str:
    """Return the text of the first EXAMPLE_TOKENS tokens of a run's validation split, without end-of-text tokens.

    For a mixture, this is the split of its first dataset.

    Raises ValueError if the split or its tokenizer cannot be read, for example because the dataset no longer exists.
    """
    directory = dataset_directories(config)[0]
    try:
        split = open_split(directory, "val")
        tokenizer = load_tokenizer(directory)
    except (OSError, ValueError) as error:
        raise ValueError(f"the run has no text to show ({error}): give one with --text") from None
    ids = np.empty(min(EXAMPLE_TOKENS, split.n_tokens), TOKEN)
    split.read(0, ids)
    return tokenizer.decode([token for token in ids.tolist() if token != tokenizer.eot])
