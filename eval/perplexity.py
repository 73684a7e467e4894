"""Perplexity of long texts with a sliding window that scores every token once.

The text is treated as one document that starts with end-of-text. With stride s, each window scores s new tokens. Each
of these tokens is predicted from at least block_size + 1 - s tokens, or from all previous tokens if there are fewer. A
smaller stride usually gives a lower perplexity, so perplexities with different strides cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.loader import ceil_div
from eval.detokenizers import detokenize_ptb, detokenize_ptb_style, detokenize_wikitext
from eval.likelihood import Request, Scorer
from eval.rows import load_hub_rows

# With more nats per word than this, the perplexity per word, exp(nats per word), is not computed: exp(710) overflows a
# float. The limit leaves room for the standard error, which may be larger than the perplexity.
MAX_NATS = 700.0


class Perplexity(NamedTuple):
    """The negative log-likelihood of a text in nats, and its number of tokens, in total and for each of K windows."""

    nats: float
    tokens: int
    window_nats: np.ndarray  # (K,)
    window_tokens: np.ndarray  # (K,)

    def normalized(self, units: float) -> tuple[float, float]:
        """Return nats per unit and their standard error. `units` is the number of tokens, words or bytes of the text.

        For the standard error, each window is one sample.
        """
        n = len(self.window_nats)
        spread = self.window_nats - self.window_tokens * (self.nats / self.tokens)
        stderr = math.sqrt(float(spread @ spread) * n / (n - 1)) / units if n > 1 else 0.0
        return self.nats / units, stderr


class SlidingWindows(Sequence[Request]):
    """The windows of a text: request i scores tokens i * stride .. (i + 1) * stride - 1, given the tokens before them.

    Requests are built when they are accessed, so that the overlapping windows of a long text are never all in memory.
    """

    def __init__(self, tokens: Sequence[int], eot: int, block_size: int, stride: int) -> None:
        self.tokens, self.eot, self.block_size, self.stride = tokens, eot, block_size, stride

    def __len__(self) -> int:
        return ceil_div(len(self.tokens), self.stride)

    def __getitem__(self, index: Any) -> Any:
        """Return the request at an index, or the list of requests in a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        continuation = tuple(self.tokens[start : start + self.stride])
        room = self.block_size + 1 - len(continuation)  # the last token is predicted but not an input
        context = tuple(self.tokens[max(0, start - room) : start])
        return Request((self.eot, *context)[-room:], continuation)


def perplexity(tokens: Sequence[int], eot: int, block_size: int, stride: int, score: Scorer) -> Perplexity:
    """Score every token of a text with sliding windows.

    Raises ValueError if the text has no tokens, or if the stride is not in 1..block_size.
    """
    if not len(tokens):
        raise ValueError("the text is empty")
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride {stride}: expected 1..{block_size}; {block_size} is the model's block size")
    window_nats = -score(SlidingWindows(tokens, eot, block_size, stride)).log_probs
    window_tokens = np.minimum(stride, len(tokens) - np.arange(0, len(tokens), stride))
    return Perplexity(float(window_nats.sum()), len(tokens), window_nats, window_tokens)


def perplexity_metrics(result: Perplexity, n_bytes: int, n_words: int) -> dict[str, tuple[float, float]]:
    """Return (value, standard error) of perplexity per token, bits per byte and perplexity per word.

    Bits per byte is absent if n_bytes is 0. Perplexity per word is absent if n_words is 0, or if it is too large (see
    MAX_NATS), for example in a language without spaces.
    """
    nats, stderr = result.normalized(result.tokens)
    metrics = {"perplexity": (math.exp(nats), math.exp(nats) * stderr)}
    if n_bytes:
        nats, stderr = result.normalized(n_bytes)
        metrics["bits_per_byte"] = (nats / math.log(2), stderr / math.log(2))
    if n_words:
        nats, stderr = result.normalized(n_words)
        if nats < MAX_NATS:
            metrics["word_perplexity"] = (math.exp(nats), math.exp(nats) * stderr)
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# The corpora of the GPT-2 paper. Some are split into word tokens, but GPT-2 was trained on plain text, so a detokenizer
# restores the plain text first. As in the paper, perplexity per word still counts the words of the original corpus.


@dataclass(frozen=True)
class Corpus:
    """A corpus on which perplexity or bits per byte of GPT-2 models is published.

    Attributes:
        hub: dataset, configuration and split on the hub.
        detokenize: restores plain text from the corpus; `str` leaves the corpus unchanged.
        field: the column that holds the text.
        separator: the text that is inserted between two rows when all rows are joined.
        convention: beginning of the name of the convention in the results. "stride N" follows it.
    """

    hub: tuple[str, str | None, str]
    detokenize: Callable[[str], str]
    field: str = "text"
    separator: str = ""
    convention: str = "paper, "

    def load(self) -> str:
        """Load the raw corpus from the hub. Raises OSError if it cannot be downloaded."""
        return self.separator.join(row[self.field] for row in load_hub_rows(*self.hub))


CORPORA: dict[str, Corpus] = {
    "wikitext-2": Corpus(("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), detokenize_wikitext),
    # The text is not detokenized, as in Hugging Face's guide "Perplexity of fixed-length models".
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
    """Read a text file. Raises OSError if it cannot be read, ValueError if it is not UTF-8 or has no text."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
