"""Perplexity of long texts: a window slides over the tokens, and each is scored once.

The text is taken as one document, after end-of-text. With stride s each forward pass scores s new tokens after the
block_size - s before them, so each is predicted from at least that many, or from all there are. A small stride costs
more passes and gives a lower, better figure; stride 1 is the exact one. Figures of different strides do not compare.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.choices import detokenize_ptb_style, load_hub_rows
from eval.likelihood import Request, Scorer

REQUESTS_AT_ONCE = 1024  # so that a large corpus is not held as a million Python lists
MAX_NATS = 700.0  # e^709 is the largest that a float holds, and infinity is not JSON; the standard error needs room too


class Perplexity(NamedTuple):
    """Summed negative log-likelihood in nats of `tokens` tokens, and the sums over each window, for standard errors."""

    nats: float
    tokens: int
    window_nats: np.ndarray  # (K,)
    window_tokens: np.ndarray  # (K,)

    def normalized(self, units: float) -> tuple[float, float]:
        """Nats for each of `units` (tokens, words or bytes) and the standard error, windows being the sample."""
        n = len(self.window_nats)
        spread = self.window_nats - self.window_tokens * (self.nats / self.tokens)
        stderr = math.sqrt(float(spread @ spread) * n / (n - 1)) / units if n > 1 else 0.0
        return self.nats / units, stderr


def windows(tokens: Sequence[int], eot: int, block_size: int, stride: int) -> Iterator[Request]:
    """Each `stride` tokens with what stands before them in the window."""
    for start in range(0, len(tokens), stride):
        ending = tuple(tokens[start : start + stride])
        room = block_size + 1 - len(ending)  # the last token is only predicted
        context = tuple(tokens[max(0, start - room) : start])
        yield Request((eot, *context)[-room:], ending)


def perplexity(tokens: Sequence[int], eot: int, block_size: int, stride: int, score: Scorer) -> Perplexity:
    """Score every token of a text.

    Raises ValueError for a text without tokens and for a stride that is not in 1..block_size.
    """
    if not len(tokens):
        raise ValueError("the text is empty")
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride {stride}: expected 1..{block_size}, the length of the model's context")
    requests = windows(tokens, eot, block_size, stride)
    sums: list[np.ndarray] = []
    counts: list[int] = []
    while group := list(islice(requests, REQUESTS_AT_ONCE)):
        sums.append(score(group).log_probs)
        counts += [len(request.ending) for request in group]
    window_nats = -np.concatenate(sums)
    return Perplexity(float(window_nats.sum()), len(tokens), window_nats, np.array(counts))


def summarize(result: Perplexity, n_bytes: int, n_words: int) -> dict[str, tuple[float, float]]:
    """(value, standard error) of perplexity by token, bits per byte, and perplexity by word where there are words.

    The last is left out where a float cannot hold it: of long texts in few words, as in scripts without spaces.
    """
    nats, stderr = result.normalized(result.tokens)
    figures = {"perplexity": (math.exp(nats), math.exp(nats) * stderr)}
    if n_bytes:
        nats, stderr = result.normalized(n_bytes)
        figures["bits_per_byte"] = (nats / math.log(2), stderr / math.log(2))
    if n_words:
        nats, stderr = result.normalized(n_words)
        if nats < MAX_NATS:
            figures["word_perplexity"] = (math.exp(nats), math.exp(nats) * stderr)
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# The corpora of the GPT-2 paper. Their tokens are not text as GPT-2 knows it, so they are first turned back into text;
# perplexity is then still counted by the corpus' own words, as in the paper.


def detokenize_wikitext(text: str) -> str:
    """Undo WikiText's tokenisation (Merity et al. 2016): ` @-@ `, ` = headings = ` and spaces around punctuation."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([.,;:!?)\]}])", r"\1", re.sub(r"([(\[{]) ", r"\1", text))
    text = re.sub(r' "([^"\n]*) "', lambda match: f' "{match[1].lstrip()}"', text)
    text = re.sub(r" ('s|'t|'d|'m|'re|'ve|'ll|n't)\b", r"\1", text)
    text = re.sub(r"^ (=+) (.*?) \1 ?$", r"\1 \2 \1", text, flags=re.MULTILINE)
    return re.sub(r"^ | $", "", text, flags=re.MULTILINE)


def detokenize_ptb(text: str) -> str:
    """Undo the Penn Treebank's tokenisation as Mikolov prepared it: N for numbers, <unk>, `n't` apart."""
    return detokenize_ptb_style(re.sub(r"^ | $", "", text, flags=re.MULTILINE)).replace("$ N", "$N")


@dataclass(frozen=True)
class Corpus:
    """A corpus for word or byte perplexity: data set, configuration and split on the hub, the column with the text,
    what stands between its rows, how to turn it back into text (`str`: it is text), and the convention so followed."""

    hub: tuple[str, str | None, str]
    detokenize: Callable[[str], str]
    field: str = "text"
    separator: str = ""
    convention: str = "paper, "

    def load(self) -> str:
        """The raw corpus, from the hub. Raises OSError when it cannot be had."""
        return self.separator.join(row[self.field] for row in load_hub_rows(*self.hub))


CORPORA: dict[str, Corpus] = {
    "wikitext-2": Corpus(("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), detokenize_wikitext),
    # as in Hugging Face's "Perplexity of fixed-length models"
    "wikitext-2-raw": Corpus(
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), str, separator="\n\n", convention=""
    ),
    "wikitext-103": Corpus(("Salesforce/wikitext", "wikitext-103-raw-v1", "test"), detokenize_wikitext),
    "ptb": Corpus(
        ("ptb-text-only/ptb_text_only", "penn_treebank", "test"), detokenize_ptb, field="sentence", separator="\n"
    ),
    "enwik8": Corpus(("LTCB/enwik8", "enwik8", "train"), str, separator="\n"),
    "text8": Corpus(("afmck/text8", None, "test"), str),
    "1bw": Corpus(("dvruette/lm1b", None, "test"), detokenize_ptb_style, separator="\n"),
}


def read_text(path: str | Path) -> str:
    """A text file. Raises OSError when it cannot be read, ValueError when it is not UTF-8 or has no text."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
